"""Judge answers to MT-Bench style questions with any OpenAI-compatible judge, and report what came out.

Import what you need from the modules; this file imports nothing on purpose.
"""
