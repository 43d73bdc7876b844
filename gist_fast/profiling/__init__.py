"""Where the time of a training step goes: a profiled run (`run`), and its trace by regions (`trace`)."""

from gist_fast.profiling.run import Profile, profile_training, profiling_arguments

__all__ = ["Profile", "profile_training", "profiling_arguments"]
