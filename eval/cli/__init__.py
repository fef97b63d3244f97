"""The command line: one file for each command of `pikv`, and what they print.

Options come in as the user typed them; each command checks them, imports what does the work only then, and ends with an
exit status, 2 and one line for what the user can mend. May import everything of the evaluation but studies and
training.
"""
