"""Systems of atoms, periodic or not: how they are held, stored and brought to tokens. Chemistry is the modalities'."""
