"""Reasoned training rows from bare labels (Crab, 2503.13068: the construction of AV-UIE).

    python -m crab_min.tools.reason --data IN --out OUT --llm MODEL

Read in this order: briefs and examples (what a model is told), verify (what it may answer), writers
(who answers), asking (ask, check, ask again, log), rows (what is read and written), report.
"""
