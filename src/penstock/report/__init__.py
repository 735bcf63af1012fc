"""What a person sees of a run: the JSON report, the lines on the terminal, the plot."""
