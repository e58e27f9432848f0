"""One file for each module that decides something: in this process, in milliseconds, exact.

`make mutants` runs these tests in processes that it forks, one for each change that it makes to the
code. So none of them may use a model runtime, LanceDB, a server, a thread that outlives it or an
event loop of another test.
"""
