"""From names on the command line to a finished run folder."""
