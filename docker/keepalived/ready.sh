#!/bin/sh
# May this host have the address? ready.sh OWN OTHER, the URLs of the two balancers' endpoints.
# Its own balancer is ready; or it runs, and the other one is no better: then clients wait here for a replica.
ready() { curl -fsSk -m 0.4 -o /dev/null "$1/ready"; }
ready "$1" && exit 0
curl -sk -m 0.2 -o /dev/null "$1/ready" || exit 1
! ready "$2"
