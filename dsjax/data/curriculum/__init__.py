"""Curricula: difficulty of rows by metrics, schedules, and the draw of easy rows first.

May import the other folders of data, and checkpoint; rows/pipeline.py may import its draw.py.
"""
