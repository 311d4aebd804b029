#!/usr/bin/env bash
# Builds Kubernetes' control plane and kubelet once, into a cache folder, from the source package of Debian 12, which holds all of
# it with what it depends on. Needs a Debian with make, a C compiler and some 3 GiB of disk for the time being; no root. Prints the
# folder with the programs. Ten minutes of one core (JOBS=4 for more).
set -euo pipefail

version=1.20.2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/groundserve/kubernetes-$version
programs="kube-apiserver kube-controller-manager kube-scheduler kubelet"
if [ -e "$cache/complete" ]; then
    echo "$cache/bin"
    exit
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # a second build waits, and finds what the first one made
if [ -e "$cache/complete" ]; then
    echo "$cache/bin"
    exit
fi
work=$cache/work
rm -rf "$work"
mkdir -p "$work"/{apt/state/lists/partial,apt/cache/archives/partial,root,home} "$cache/bin"
cd "$work"

# The machine's own mirror, asked for Debian 12 and for sources, with an index of our own: the machine's stays as it is.
mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1)
mirror=${mirror:-$(sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' /etc/apt/sources.list 2>/dev/null | head -1)}
[ -n "$mirror" ] || { echo "build.sh: no mirror of Debian in /etc/apt" >&2; exit 1; }
printf 'Types: deb deb-src\nURIs: %s\nSuites: bookworm\nComponents: main\nSigned-By: %s\n' \
    "${mirror%% *}" /usr/share/keyrings/debian-archive-keyring.gpg >apt/debian.sources
apt=(-q -o "Dir::State=$work/apt/state" -o Dir::State::status=/dev/null -o "Dir::Cache=$work/apt/cache"
    -o "Dir::Etc::SourceList=$work/apt/debian.sources" -o Dir::Etc::SourceParts=/dev/null -o "APT::Sandbox::User=$(id -un)")
{
    apt-get "${apt[@]}" update
    apt-get "${apt[@]}" source --download-only kubernetes
    apt-get "${apt[@]}" download golang-1.19-go golang-1.19-src etcd-server kubernetes-client rsync libpopt0 libxxhash0
    for package in *.deb; do dpkg-deb -x "$package" root; done
    dpkg-source --no-check -x kubernetes_*.dsc source

    cat >version <<-END
	KUBE_GIT_COMMIT=debian
	KUBE_GIT_TREE_STATE=archive
	KUBE_GIT_VERSION=v$version
	KUBE_GIT_MAJOR=1
	KUBE_GIT_MINOR=20
	END
    export KUBE_GIT_VERSION_FILE=$work/version HOME=$work/home
    export GOROOT=$work/root/usr/lib/go-1.19 GOPATH=$work/source/.go GOCACHE=$work/gocache
    export PATH=$GOROOT/bin:$work/root/usr/bin:$PATH LD_LIBRARY_PATH=$work/root/usr/lib/$(uname -m)-linux-gnu
    export GOMAXPROCS=${JOBS:-1} GOFLAGS=-p=${JOBS:-1} CGO_ENABLED=0 GOTOOLCHAIN=local GOPROXY=off
    make -C source generated_files
    for program in $programs; do make -C source "WHAT=cmd/$program"; done
} >"$cache/build.log" 2>&1 || { tail -20 "$cache/build.log" >&2; echo "build.sh: the whole log is $cache/build.log" >&2; exit 1; }

for program in $programs; do cp "source/_output/bin/$program" "$cache/bin/"; done
cp root/usr/bin/etcd root/usr/bin/kubectl "$cache/bin/"
chmod -R u+w "$work" # Go's cache of modules is read-only
rm -rf "$work"
touch "$cache/complete"
echo "$cache/bin"
