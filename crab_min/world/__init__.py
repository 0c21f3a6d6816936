"""The built-in audio-visual world, a synthetic data set with exact labels.

To read it from the ground up: things, scenes, faces, rendering (what is shown), clauses, questions,
clip_rows, frame_rows (what is said about it), folders (files), side_channels (PAVE and CREMA).
"""
