"""Judge answers to MT-Bench style questions with any OpenAI-compatible judge, and report the results.

Import what you need from the modules. This file imports nothing on purpose.
"""
