"""The machine below: what it is, how warm it is and what it draws. Pure functions of a root folder; None: not measured."""
