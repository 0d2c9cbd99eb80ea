package cmdline

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mac(s string) net.HardwareAddr {
	hw, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return hw
}

func TestParse(t *testing.T) {
	unset := Cmdline{SessionID: Unset, NodeID: Unset, NodesMin: Unset, AutoNodeID: true}
	with := func(f func(*Cmdline)) Cmdline { c := unset; f(&c); return c }
	for _, tc := range []struct {
		name, line string
		want       Cmdline
		problems   []string // substrings, one a problem
	}{
		{name: "empty", line: "", want: unset},
		{
			name: "the 2010 talk",
			line: "ro root=/dev/ram ip=dhcp nfsroot=192.168.122.1:/srv/chroot/kerrighed session_id=1 node_id=1\n",
			want: with(func(c *Cmdline) {
				c.SessionID, c.NodeID = 1, 1
				c.NFSRoot = NFSRoot{Server: "192.168.122.1", Path: "/srv/chroot/kerrighed"}
			}),
		},
		{
			name: "our own head",
			line: "ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/,port=2050 session_id=7 node_id=300 autonodeid=0 BOOTIF=01-52-54-00-ab-cd-ef quiet",
			want: with(func(c *Cmdline) {
				c.SessionID, c.AutoNodeID = 7, false
				c.NFSRoot = NFSRoot{Server: "10.77.0.254", Path: "/", Options: []string{"port=2050"}}
				c.BootIF = mac("52:54:00:ab:cd:ef")
			}),
			problems: []string{"node_id=300: want a number from 0 to 255"},
		},
		{
			name: "kerrighedize",
			line: "initrd=initrd.img-krg rw root=/dev/nfs nfsroot=10.0.0.1:/,rsize=4096,wsize=4096 ip=dhcp session_id=3 autonodeid=1 init=/sbin/init-krg",
			want: with(func(c *Cmdline) {
				c.SessionID = 3
				c.NFSRoot = NFSRoot{Server: "10.0.0.1", Path: "/", Options: []string{"rsize=4096", "wsize=4096"}}
			}),
		},
		{
			name: "last word wins, quotes, nothing after --",
			line: `session_id=1 session_id="2" nb_nodes_min=4 x="a session_id=9 b" -- session_id=3`,
			want: with(func(c *Cmdline) { c.SessionID, c.NodesMin = 2, 4 }),
		},
		{
			name: "nfsroot without server, device in ip=",
			line: "nfsroot=/srv/root ip=:::::eth1:dhcp",
			want: with(func(c *Cmdline) { c.NFSRoot.Path = "/srv/root"; c.Device = "eth1" }),
		},
		{
			name:     "bad values leave the fields unset",
			line:     "session_id=0 node_id=x autonodeid=2 nfsroot=relative BOOTIF=20-52-54-00-ab-cd-ef ip=10.0.0.5::10.0.0.1:255.255.255.0:n:eth0:off",
			want:     with(func(c *Cmdline) { c.Device = "eth0" }),
			problems: []string{"session_id=0", "node_id=x", "autonodeid=2", "nfsroot=relative", "BOOTIF=20", "only DHCP"},
		},
		{name: "BOOTIF with colons and no type", line: "BOOTIF=52:54:00:ab:cd:ef", want: with(func(c *Cmdline) { c.BootIF = mac("52:54:00:ab:cd:ef") })},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := Parse(tc.line)
			problems := got.Problems
			got.Problems = nil
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("Parse(%q) (-want +got):\n%s", tc.line, diff)
			}
			if len(problems) != len(tc.problems) {
				t.Fatalf("problems = %v, want %d", problems, len(tc.problems))
			}
			for i, p := range problems {
				if !strings.Contains(p.Error(), tc.problems[i]) {
					t.Errorf("problem %d = %q, want it to say %q", i, p, tc.problems[i])
				}
			}
		})
	}
}

func TestIdentity(t *testing.T) {
	address := netip.MustParseAddr("10.77.0.42")
	for _, tc := range []struct {
		name, line string
		address    netip.Addr
		want       Identity
	}{
		{"address overrides node_id", "session_id=1 node_id=7", address, Identity{1, 42}},
		{"autonodeid=0 keeps node_id", "session_id=1 node_id=7 autonodeid=0", address, Identity{1, 7}},
		{"no node_id, no autonodeid", "session_id=1 autonodeid=0", address, Identity{1, Unset}},
		{"no session", "", address, Identity{Unset, 42}},
		{"no address", "session_id=1 node_id=7", netip.Addr{}, Identity{1, 7}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Parse(tc.line).Identity(tc.address); got != tc.want {
				t.Errorf("Identity = %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestNodesFile(t *testing.T) {
	const text = "session=12 # the lab\nnbmin=2\n\nalpha:1\nbeta:2:eth1\ngamma:999\n:3\nnonsense\n"
	f := ParseNodesFile(text)
	if f.SessionID != 12 || f.NodesMin != 2 || len(f.Nodes) != 2 {
		t.Errorf("got %+v", f)
	}
	if len(f.Problems) != 3 || !strings.Contains(f.Problems[0].Error(), "/etc/kerrighed_nodes:6:") {
		t.Errorf("problems = %v", f.Problems)
	}
	for _, tc := range []struct {
		name  string
		id    Identity
		hosts []string
		want  Identity
	}{
		{"both from the file", Identity{Unset, Unset}, []string{"shared", "beta"}, Identity{12, 2}},
		{"first name wins", Identity{Unset, Unset}, []string{"alpha", "beta"}, Identity{12, 1}},
		{"known ids stay", Identity{3, 4}, []string{"alpha"}, Identity{3, 4}},
		{"stranger", Identity{3, Unset}, []string{"delta", ""}, Identity{3, Unset}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := f.Fill(tc.id, tc.hosts...)
			if got != tc.want {
				t.Errorf("Fill = %+v, want %+v", got, tc.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("ro root=/dev/ram ip=dhcp nfsroot=192.168.122.1:/srv,port=1 session_id=1 node_id=1 BOOTIF=01-52-54-00-ab-cd-ef")
	f.Add(`a="b c" "d -- e=`)
	f.Fuzz(func(t *testing.T, line string) {
		c := Parse(line)
		if c.SessionID != Unset && (c.SessionID < MinSession || c.SessionID > MaxSession) {
			t.Errorf("session id %d out of range", c.SessionID)
		}
		if c.NodeID != Unset && (c.NodeID < 0 || c.NodeID > MaxNode) {
			t.Errorf("node id %d out of range", c.NodeID)
		}
		if c.BootIF != nil && len(c.BootIF) != 6 {
			t.Errorf("BOOTIF of %d bytes", len(c.BootIF))
		}
		if c.NFSRoot.Path != "" && c.NFSRoot.Path[0] != '/' {
			t.Errorf("relative nfsroot %q", c.NFSRoot.Path)
		}
	})
}

func FuzzNodesFile(f *testing.F) {
	f.Add("session=12\nalpha:1\nbeta:2:eth1 # x\n")
	f.Fuzz(func(t *testing.T, text string) {
		for host, id := range ParseNodesFile(text).Nodes {
			if host == "" || id < 0 || id > MaxNode {
				t.Errorf("accepted %q:%d", host, id)
			}
		}
	})
}
