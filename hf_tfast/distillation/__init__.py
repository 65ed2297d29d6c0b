"""Distillation: a teacher, its fast student, and what brings the student back to the teacher's quality.

losses      pure functions: what a student's numbers are compared with, and how that becomes one number
layers      which layer of the teacher a layer of the student learns from; projections between widths
layerwise   stage 1: every layer of the student reads the teacher's input of that layer and matches its output
whole       stage 2: logits and hidden states of the whole
cache       a teacher's logits on disk
sequences   sequence-level distillation: the teacher's own outputs as targets
trainer     Transformers' Trainer with a teacher; divergence: where numbers stopped being finite
"""
