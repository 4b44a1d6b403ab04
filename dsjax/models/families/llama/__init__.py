"""Llama: settings, architecture, and form in Hugging Face folders.

Imports as models/families says.
"""
