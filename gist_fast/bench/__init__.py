"""What `gist-fast bench` measures, and how.

A suite (`suite`; `loss`, `training`, `start`) names cases and competitors and builds, for each, the calls to time.
`run` takes any suite through the same steps: what cannot fit is a row by formula (`peers`), every competitor's result
is checked and its memory measured in a process of its own under a limit (`isolated`), and those that are left are timed
once a round (`timing`). `growth` fits how time and memory grow with the batch; `results` is the file, `compare` two of
them, `tables` and `plots` what is shown.
"""
