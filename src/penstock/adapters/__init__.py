"""penstock inside other libraries: the only place where their interfaces appear."""
