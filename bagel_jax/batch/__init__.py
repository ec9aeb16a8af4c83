"""Batch jobs: a file with a request a line in, a record a line out, whatever dies on the way.

A job's lines are cut into blocks. Workers claim blocks, they are not assigned them: every worker is the same command on
the same folder, started when and where one likes. A block's results appear at once, when all its lines are done.
"""
