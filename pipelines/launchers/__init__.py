"""How training processes are started: one module each, found by its name. It offers

    check(launch)       RecipeError if something is missing in the recipe's section `launch`, or a program on this machine
    command(job)        the argument list of a program that lasts as long as the training; sent SIGTERM it has every process on every
                        machine save a checkpoint, and it has ended them all `train.GRACE_SECONDS` later
    environment(job)    what that program runs with
    described(job)      a line for the log: what is started where, and what remains to be done by hand

A failing training tells why in `outcome.json` of its work directory, so the exit status need only be zero or not.
"""
