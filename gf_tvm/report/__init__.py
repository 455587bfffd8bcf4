"""One page and its plots from the JSON files of the commands.

Each module builds on those before it:

===========  ==========================================================================================
fields       checks what is read, field by field
sources      reads the files: comparisons, tuning, training, evaluations
exhibits     what a page is made of: sections, figures, tables, and where numbers come from
roofline     the roofline of a comparison
comparisons  speed, memory and roofline, convolution by convolution
tuning       best time so far over the trials
settings     runs of training and settings of an evaluation in one form
training     score, time split, memory, cosine
page         HTML, SVG and PNG files
===========  ==========================================================================================
"""
