"""Objectives: what a step minimises and which rows it reads.

May import models, data and what is below them.
"""
