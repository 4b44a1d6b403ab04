"""The `dsjax` command, one file per verb: parse, call, print.

May import every room; nobody imports it but `dsjax/__main__.py`.
"""
