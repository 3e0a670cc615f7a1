"""The code that an exported routed model needs: copied beside its weights, never imported by it.

It imports torch and transformers alone, so that it runs where modtrain is not installed.
"""
