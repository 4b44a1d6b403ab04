"""Curricula: difficulty of rows by metrics, schedules, and the draw of easy rows first.

Imports data/rows and data/corpus.
"""
