// Package test drives the real programs the way a person would: krgimage on the
// command line, ssh into the nodes. Its tests boot real Debian kernels in QEMU
// over the real boot path, from an image that they build themselves.
//
// The program under test is bin/krgimage of the checkout, made by `make`, or the
// one that KRGIMAGE names. Downloaded packages are kept in the user's cache
// directory between runs, as for any user.
package test
