package configs

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

// interfaceName is stricter than the kernel's dev_valid_name, which would let
// through quotes and control characters.
var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}$`)

func (k *checker) network() {
	n := k.c.Network
	if s := n.Interface; s != "" && !interfaceName.MatchString(s) {
		k.bad("network.interface", quote(s)+" is not the name of a network interface", "'ip link' lists them; at most 15 characters")
	}
	k.within("network.http_port", n.HTTPPort, 1, 65535)
	k.within("network.nfs_port", n.NFSPort, 1, 65535)
	k.within("network.cluster_port", n.ClusterPort, 1, 65535)
	k.within("network.link_port", n.LinkPort, 1, 65535)
	if n.HTTPPort == n.NFSPort {
		k.bad("network.nfs_port", fmt.Sprintf("%d is http_port, too", n.NFSPort), "both are TCP on the head node; choose two")
	}
	for _, other := range []struct {
		name string
		port int
	}{{"http_port", n.HTTPPort}, {"nfs_port", n.NFSPort}} {
		if n.ClusterPort == other.port {
			k.bad("network.cluster_port", fmt.Sprintf("%d is %s, too", n.ClusterPort, other.name), "both are TCP on the head node; choose two")
		}
	}
	if n.LinkPort == sshPort {
		k.bad("network.link_port", fmt.Sprintf("%d is the port of the nodes' sshd", n.LinkPort), "choose another, for example 7471")
	}
	switch lease := time.Duration(n.Lease); {
	case lease < time.Minute || lease > 365*24*time.Hour:
		k.bad("network.lease", n.Lease.String()+" is not in 1m..8760h", "for example 12h")
	case lease%time.Second != 0:
		k.bad("network.lease", n.Lease.String()+" is not a whole number of seconds", "")
	}
	if !k.subnet() {
		return
	}
	hint := fmt.Sprintf("an address from %s to %s", n.Subnet.Addr().Next(), lastUsable(n.Subnet))
	if k.host("network.head", n.Head, hint) && n.Gateway.IsValid() {
		k.host("network.gateway", n.Gateway, hint)
	}
	for i, a := range n.DNS {
		at := index("network.dns", i)
		switch {
		case !a.Is4() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
			k.bad(at, quote(a.String())+" is not the IPv4 address of a name server", "for example 10.77.0.254")
		case n.Subnet.Contains(a):
			k.host(at, a, hint)
		case !n.Gateway.IsValid():
			k.bad(at, fmt.Sprintf("%s is outside %s and the nodes have no way there", a, n.Subnet), "set network.gateway")
		}
	}
	k.once("network.dns", texts(n.DNS), same)
}

// sshPort is where the container's sshd listens on every node.
const sshPort = 2222

func texts(addrs []netip.Addr) []string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return out
}

// subnet checks the subnet; false when no address can be judged by it.
func (k *checker) subnet() bool {
	p := k.c.Network.Subnet
	const field = "network.subnet"
	switch {
	case !p.IsValid():
		k.bad(field, "is empty", "for example 10.77.0.0/24")
	case !p.Addr().Is4():
		k.bad(field, p.String()+" is not IPv4", "PXE and node ids need IPv4, for example 10.77.0.0/24")
	case p.Bits() < 16 || p.Bits() > 30:
		k.bad(field, p.String()+" is too "+map[bool]string{true: "large", false: "small"}[p.Bits() < 16], "from /16 to /30; /24 has room for every node id")
	case p != p.Masked():
		k.bad(field, fmt.Sprintf("%s is an address in the subnet, not the subnet", p), "write "+p.Masked().String())
	case p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().As4()[0] == 0 || p.Addr().As4()[0] >= 240:
		k.bad(field, p.String()+" is not for hosts", "for example 10.77.0.0/24")
	default:
		return true
	}
	return false
}

// host checks that a can be a machine's address in the subnet.
func (k *checker) host(field string, a netip.Addr, hint string) bool {
	p := k.c.Network.Subnet
	switch {
	case !a.Is4():
		k.bad(field, quote(a.String())+" is not an IPv4 address", hint)
	case !p.Contains(a):
		k.bad(field, fmt.Sprintf("%s is outside the subnet %s", a, p), hint)
	case a == p.Addr():
		k.bad(field, fmt.Sprintf("%s is the network address of %s", a, p), hint)
	case a == broadcast(p):
		k.bad(field, fmt.Sprintf("%s is the broadcast address of %s", a, p), hint)
	default:
		return true
	}
	return false
}

func (k *checker) nodes() {
	k.enum("nodes.unknown", k.c.Nodes.Unknown, "discover", "refuse", "manual")
	if p := k.c.Network.Subnet; k.c.hasSubnet() && p == p.Masked() && p.Bits() >= 16 && p.Bits() <= 30 {
		k.discoverIDs()
		k.table()
	}
}

func (k *checker) discoverIDs() {
	n := &k.c.Nodes
	if len(n.IDs) == 0 && n.Unknown != "refuse" {
		k.bad("nodes.discover_ids", "is empty, so no unknown machine can get an id", "leave it out for every free id, or set nodes.unknown: refuse")
	}
	var owner [MaxNodeID + 1]int // 1 + index of the item that has the id
	for i, s := range n.IDs {
		at := index("nodes.discover_ids", i)
		first, last, bad := parseRange(s)
		if bad != nil {
			k.bad(at, bad.Message, bad.Hint)
			continue
		}
		for id := first; id <= last; id++ {
			if j := owner[id]; j > 0 {
				k.bad(at, fmt.Sprintf("%s overlaps %s: both have id %d", s, n.IDs[j-1], id), "")
				break
			}
			owner[id] = i + 1
		}
		for id := first; id <= last; id++ {
			if why, taken := k.c.addressOwner(id); taken {
				a := k.c.Network.Subnet.Addr()
				k.bad(at, fmt.Sprintf("id %d in %s would have the address %s: %s", id, s, add4(a, uint32(id)), why),
					"free are "+strings.Join(k.c.freeIDs(), ", "))
				break
			}
		}
	}
}

func (k *checker) table() {
	macs, ids := map[MAC]int{}, map[int]int{}
	names, addrs := map[string]int{}, map[netip.Addr]int{}
	for i, n := range k.c.Nodes.Table {
		row := index("nodes.table", i)
		k.mac(row+".mac", n.MAC)
		if n.ID < 0 || n.ID > MaxNodeID {
			k.bad(row+".id", fmt.Sprintf("%d is not in 0..%d", n.ID, MaxNodeID), "")
		} else {
			k.hostname(row+".hostname", n)
			k.address(row, n)
		}
		twice(k, row+".mac", macs, n.MAC, i)
		twice(k, row+".id", ids, n.ID, i)
		if n.Hostname != "" {
			twice(k, row+".hostname", names, n.Hostname, i)
		}
		if n.Address.IsValid() {
			twice(k, row+".address", addrs, n.Address, i)
		}
	}
}

// twice reports a value that an earlier row has.
func twice[T comparable](k *checker, field string, seen map[T]int, value T, row int) {
	if j, ok := seen[value]; ok {
		k.bad(field, fmt.Sprintf("%v is that of nodes.table[%d], too", value, j), "each machine needs its own")
		return
	}
	seen[value] = row
}

func (k *checker) mac(field string, m MAC) {
	hw := m.HardwareAddr()
	switch {
	case len(hw) != 6:
		k.bad(field, quote(string(m))+" is not an Ethernet address of six bytes", "for example 52:54:00:4b:52:01")
	case hw[0]&1 != 0:
		k.bad(field, string(m)+" is a multicast address, no machine's own", "the first byte of a machine's address is even")
	case slices.Max(hw) == 0:
		k.bad(field, string(m)+" is no machine's address", "the firmware shows it when it tries to boot from the network")
	}
}

func (k *checker) hostname(field string, n Node) {
	if !dnsLabel.MatchString(n.Hostname) {
		k.bad(field, quote(n.Hostname)+" is not a DNS label", dnsLabelHint+k.c.Hostname(n.ID))
		return
	}
	if n.Hostname == "localhost" {
		k.bad(field, "localhost is every machine's own name", "for example "+k.c.Hostname(n.ID))
	}
	if n.Hostname == k.c.Name+"-head" {
		k.bad(field, n.Hostname+" is the head node's name", "for example "+k.c.Hostname(n.ID))
	}
	for id := 0; id <= MaxNodeID; id++ {
		if id != n.ID && n.Hostname == k.c.Hostname(id) {
			k.bad(field, fmt.Sprintf("%s is the default name of node %d, this is node %d", n.Hostname, id, n.ID), "choose a name that doesn't read as another node's")
		}
	}
}

// address checks a row's address; one that follows from the id is a finding
// about the id.
func (k *checker) address(row string, n Node) {
	c := k.c
	byID, err := c.Address(n.ID)
	if !n.Address.IsValid() {
		k.bad(row+".id", fmt.Sprintf("%d leaves the subnet %s", n.ID, c.Network.Subnet), "choose a lower id or give the address")
		return
	}
	field, hint := row+".address", "choose another"
	if err == nil && n.Address == byID {
		field, hint = row+".id", fmt.Sprintf("choose another id or give node %d another address", n.ID)
	}
	switch a := n.Address; {
	case !k.host(field, a, hint):
	case a == c.Network.Head:
		k.bad(field, a.String()+" is the head node's address", hint)
	case a == c.Network.Gateway:
		k.bad(field, a.String()+" is the gateway's address", hint)
	}
}
