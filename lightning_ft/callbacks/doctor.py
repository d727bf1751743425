class Doctor:
    pass
