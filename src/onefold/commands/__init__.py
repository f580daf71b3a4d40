"""The main path, one verb a stage: each reads files and writes files, and can be run alone, again, elsewhere.

recipe -> `start_run` -> runs/<name>/ -> `fuse` -> fused.safetensors -> `export` -> artifacts/ -> `bench` -> results/
-> `write_report_page` -> report.html; and on any of them `evaluate` and `predict`. `demo` is all of it.
"""
