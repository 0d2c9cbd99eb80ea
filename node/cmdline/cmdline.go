// Package cmdline reads a node's kernel command line and decides from it who
// the node is.
//
// The line is Kerrighed's, so that boot menus written for it keep working:
//
//	ro root=/dev/ram ip=dhcp nfsroot=SERVER:/PATH[,OPTIONS] session_id=N node_id=M
//	[autonodeid=0|1] [nb_nodes_min=N] [BOOTIF=01-aa-bb-cc-dd-ee-ff]
//
// Parse never fails as a whole: a node that can't understand one word should
// still bring up its network and say so. What was wrong is in Problems.
// Stage 1 calls Parse, then Identity once it knows the leased address.
package cmdline

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Unset is the value of an id that the command line doesn't give.
const Unset = -1

// Bounds of Kerrighed's id spaces.
const (
	MinSession = 1
	MaxSession = 9999
	MaxNode    = 255
)

// ErrIncompleteIDs has Kerrighed's own words for a node that doesn't know its
// session or node id; scripts that watch a serial console look for them.
//
//lint:ignore ST1005 the text is the original's
var ErrIncompleteIDs = errors.New("kerrighed: incomplete session ID / node ID settings!")

// Cmdline is what a node's kernel command line says.
type Cmdline struct {
	SessionID  int  // session_id=, or Unset
	NodeID     int  // node_id=, or Unset
	AutoNodeID bool // autonodeid=, on unless switched off
	NodesMin   int  // nb_nodes_min=, or Unset; kept for show, unused since Kerrighed 3.0

	NFSRoot NFSRoot          // nfsroot=
	BootIF  net.HardwareAddr // BOOTIF=, the interface the firmware booted from; nil if not given
	Device  string           // device field of ip=, for example eth0; mostly empty

	Problems []error // words that were understood but have bad values
}

// NFSRoot is the value of nfsroot=[SERVER:]PATH[,OPTIONS]
// (Documentation/admin-guide/nfs/nfsroot.rst).
type NFSRoot struct {
	Server  string   // empty: the DHCP server's next server
	Path    string   // absolute, or empty when there is no nfsroot=
	Options []string // mount options, for example port=2050
}

// String is the form that mount(8) shows, SERVER:PATH.
func (r NFSRoot) String() string { return r.Server + ":" + r.Path }

// Option returns the value of the last option name=VALUE.
func (r NFSRoot) Option(name string) (string, bool) {
	for _, o := range slices.Backward(r.Options) {
		if v, ok := strings.CutPrefix(o, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// Parse reads a kernel command line. As in the kernel, the last of several
// equal words wins, a value may be in double quotes, and what follows a word
// "--" is for the init program and not looked at.
func Parse(line string) Cmdline {
	c := Cmdline{SessionID: Unset, NodeID: Unset, NodesMin: Unset, AutoNodeID: true}
	for _, w := range words(line) {
		if w == "--" {
			break
		}
		key, value, _ := strings.Cut(w, "=")
		if err := c.set(key, strings.Trim(value, `"`)); err != nil {
			c.Problems = append(c.Problems, fmt.Errorf("kernel command line: %s: %w", w, err))
		}
	}
	return c
}

func (c *Cmdline) set(key, value string) (err error) {
	switch key {
	case "session_id":
		c.SessionID, err = number(value, MinSession, MaxSession)
	case "node_id":
		c.NodeID, err = number(value, 0, MaxNode)
	case "nb_nodes_min":
		c.NodesMin, err = number(value, 0, MaxNode+1)
	case "autonodeid":
		var n int
		n, err = number(value, 0, 1)
		c.AutoNodeID = err != nil || n == 1
	case "nfsroot":
		c.NFSRoot, err = parseNFSRoot(value)
	case "BOOTIF":
		c.BootIF, err = parseBootIF(value)
	case "ip":
		c.Device, err = parseIP(value)
	}
	return err
}

// words splits at blanks outside double quotes, like the kernel's next_arg.
func words(line string) []string {
	var out []string
	var quoted bool
	start := -1
	for i := 0; i < len(line); i++ {
		switch b := line[i]; {
		case b == '"':
			quoted = !quoted
			if start < 0 {
				start = i
			}
		case !quoted && (b == ' ' || b == '\t' || b == '\n' || b == 0):
			if start >= 0 {
				out = append(out, line[start:i])
				start = -1
			}
		case start < 0:
			start = i
		}
	}
	if start >= 0 {
		out = append(out, line[start:])
	}
	return out
}

// number reads a decimal number and returns Unset with an error if it isn't
// one or lies outside min..max.
func number(s string, min, max int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < min || n > max {
		return Unset, fmt.Errorf("want a number from %d to %d", min, max)
	}
	return n, nil
}

func parseNFSRoot(s string) (NFSRoot, error) {
	target, options, _ := strings.Cut(s, ",")
	var r NFSRoot
	if server, path, ok := strings.Cut(target, ":"); ok {
		r.Server, r.Path = server, path
	} else {
		r.Path = target
	}
	if !strings.HasPrefix(r.Path, "/") {
		return NFSRoot{}, errors.New("want SERVER:/PATH[,OPTIONS]")
	}
	for o := range strings.SplitSeq(options, ",") {
		if o != "" {
			r.Options = append(r.Options, o)
		}
	}
	return r, nil
}

// parseBootIF reads PXELINUX's form (hardware type 01, then the address, all
// with dashes); the type may be left out and colons are as good as dashes.
func parseBootIF(s string) (net.HardwareAddr, error) {
	s = strings.ReplaceAll(s, "-", ":")
	if strings.Count(s, ":") == 6 {
		var ok bool
		if s, ok = strings.CutPrefix(s, "01:"); !ok {
			return nil, errors.New("hardware type is not 01 (Ethernet)")
		}
	}
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return nil, errors.New("want 01-aa-bb-cc-dd-ee-ff")
	}
	return hw, nil
}

// parseIP accepts the forms of ip= that end in DHCP and returns the device
// field. The long form is CLIENT:SERVER:GW:MASK:HOST:DEVICE:AUTOCONF.
func parseIP(s string) (device string, err error) {
	auto := s
	if f := strings.Split(s, ":"); len(f) > 1 {
		auto = ""
		if len(f) > 5 {
			device = f[5]
		}
		if len(f) > 6 {
			auto = f[6]
		}
	}
	switch auto {
	case "", "dhcp", "on", "any", "both":
		return device, nil
	}
	return device, errors.New("only DHCP is supported; asking DHCP all the same")
}

// Identity is who a node is in the cluster.
type Identity struct {
	SessionID int `json:"session_id"`
	NodeID    int `json:"node_id"`
}

// Complete reports whether both ids are known.
func (id Identity) Complete() bool { return id.SessionID != Unset && id.NodeID != Unset }

// Identity applies Kerrighed's rule to the ids of the command line: with
// autonodeid the node id is the last byte of the node's IPv4 address and
// overrides node_id=, because Kerrighed evaluated it last, when IP
// configuration was done. Fields that remain unknown are Unset.
func (c Cmdline) Identity(address netip.Addr) Identity {
	id := Identity{SessionID: c.SessionID, NodeID: c.NodeID}
	if c.AutoNodeID && address.Is4() {
		id.NodeID = int(address.As4()[3])
	}
	return id
}
