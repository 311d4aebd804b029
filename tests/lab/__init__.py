"""The lab: a simulated SGLang replica, in virtual time and on real sockets, and faults on demand."""
