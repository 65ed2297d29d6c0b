"""Distillation: a teacher, its fast student, and what brings the student back to the teacher's quality.

losses      pure functions: what a student's numbers are compared with, and how that becomes one number
layers      which layer of the teacher a layer of the student learns from; projections between widths
sequences   sequence-level distillation: the teacher's own outputs as targets
"""
