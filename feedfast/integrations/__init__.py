"""Other people's trainers, each in a module of its own that imports it: Lightning and Hugging Face.

`import feedfast` imports none of them. Plain loops and Accelerate need nothing from here: `feedfast.distiller` is all.
"""
