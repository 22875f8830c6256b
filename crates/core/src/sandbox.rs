//! Sandboxes: programs that work somewhere else, told what to do and watched from here.

pub mod artifacts;
