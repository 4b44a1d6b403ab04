"""A run assembled from its config: state, steps, programs, placements and the schedule of all steps.

May import models, data, objectives, optimizers and what is below them; runs and the rooms above may import it.
"""
