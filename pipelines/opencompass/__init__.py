"""OpenCompass 0.5.4 as a program of its own: what it is given, how it is run, and what is believed of what it leaves."""
