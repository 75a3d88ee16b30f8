"""The report of a run: one HTML file that says what was run, how it went, how good it is and how to go on."""
