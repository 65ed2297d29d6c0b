"""Speed, memory and the machine they were measured on: JSON lines in, tables and plots out.

environment.py  what machine, which versions        workload.py  what is timed, for SDPA and for mechanisms alike
memory.py       peak memory of one call             speed.py     interleaved timing under a time budget
table.py        tables for terminal and Markdown    plot.py      PNG plots over the length
suites.py       named sets of cases with targets    bench.py     a whole run, written to a new folder
catalogue.py    what the docstrings of the mechanisms say
"""
