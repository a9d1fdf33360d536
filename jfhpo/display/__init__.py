"""What a person sees in a terminal or a log, one module for each thing that is shown."""
