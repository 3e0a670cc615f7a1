"""`modtrain data`: what is in prepared data, and what a step of a run read.

``view``              the door: prints, or writes a page
``step_samples``      the samples of an optimizer step
``sample_documents``  the documents of a sample, with their text
``statistics``        counts, lengths, use of the vocabulary, documents seen twice
``page``              the same as one HTML page

Nothing is imported here.
"""
