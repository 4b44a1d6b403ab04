"""Objectives: what a step minimises and which rows it reads.

May import models, data and what is below them; setup and the rooms above may import it.
"""
