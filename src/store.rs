//! The models of this machine: the folder they live in, downloads, and whether one will fit.
