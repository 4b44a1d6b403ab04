"""GPT-2 and GPT-3: settings, architecture, and form in Hugging Face folders.

Imports as models/families says.
"""
