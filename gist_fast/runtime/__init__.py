"""What every part needs and none owns: errors, whole files, memory, power, environment, profiler regions."""
