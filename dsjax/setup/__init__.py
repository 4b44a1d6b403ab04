"""A run assembled from its config: state, steps, programs, placements and the schedule of all steps.

Imports models, data, objectives and optimizers; runs, plan, inference, evaluate and train may import it.
"""
