"""`xtuner chat`: a conversation in the terminal."""
