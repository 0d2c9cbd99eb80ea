package stage1

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
	"krgimage/node/lease"
	"krgimage/node/rescue"
	"krgimage/node/retry"
	"krgimage/node/settings"
)

func TestRootSource(t *testing.T) {
	l := lease.Lease{Server: netip.MustParseAddr("10.0.0.9"), Next: netip.MustParseAddr("10.0.0.8")}
	withPath := l
	withPath.RootPath = "10.0.0.7:/export,rsize=4096"
	head := &settings.Settings{NFS: settings.NFS{Server: "10.0.0.5", Port: 2050, Path: "/live"}}
	const base = "vers=3,proto=tcp,mountproto=tcp,mountvers=3,hard,acregmin=0,acregmax=0,acdirmin=1,acdirmax=1,lookupcache=positive,nolock"
	for _, tc := range []struct {
		name, line string
		head       *settings.Settings
		lease      lease.Lease
		want, data string
		flags      uintptr
		err        string
	}{
		{name: "command line", line: "nfsroot=10.0.0.1:/srv", lease: l, want: "10.0.0.1:/srv",
			data: base + ",port=2049,addr=10.0.0.1,mountaddr=10.0.0.1,mountport=2049"},
		{name: "command line over the head", line: "nfsroot=10.0.0.1:/,port=12049", head: head, lease: l, want: "10.0.0.1:/",
			data: base + ",port=12049,addr=10.0.0.1,mountaddr=10.0.0.1,mountport=12049"},
		{name: "options", line: "nfsroot=10.0.0.1:/,mountport=892,port=2050,rsize=4096,rw,noatime", lease: l, want: "10.0.0.1:/",
			data: base + ",port=2050,addr=10.0.0.1,mountaddr=10.0.0.1,mountport=892,rsize=4096", flags: unix.MS_NOATIME},
		{name: "server left out", line: "nfsroot=/srv", lease: l, want: "10.0.0.8:/srv",
			data: base + ",port=2049,addr=10.0.0.8,mountaddr=10.0.0.8,mountport=2049"},
		{name: "the head's settings", head: head, lease: withPath, want: "10.0.0.5:/live",
			data: base + ",port=2050,addr=10.0.0.5,mountaddr=10.0.0.5,mountport=2050"},
		{name: "DHCP root path", lease: withPath, want: "10.0.0.7:/export",
			data: base + ",port=2049,addr=10.0.0.7,mountaddr=10.0.0.7,mountport=2049,rsize=4096"},
		{name: "nothing", lease: l, err: errNoRoot.Error()},
		{name: "a name for the server", line: "nfsroot=filer:/srv", lease: l, err: `"filer" is not an IPv4 address`},
		{name: "a bad port", line: "nfsroot=10.0.0.1:/srv,port=0", lease: l, err: "want a port number"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := rootSource(cmdline.Parse(tc.line).NFSRoot, tc.head, tc.lease)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error = %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s.String() != tc.want || s.Data() != tc.data || s.Flags != tc.flags {
				t.Errorf("source %s flags %#x\n%s, want %s flags %#x\n%s", s, s.Flags, s.Data(), tc.want, tc.flags, tc.data)
			}
		})
	}
}

func TestCheckRoot(t *testing.T) {
	const krg = "the binary"
	sum := sha256.Sum256([]byte(krg))
	image := fmt.Sprintf(`{"name":"krg","version":"1","krg_sha256":%q,"kernel_release":"6.12"}`, hex.EncodeToString(sum[:]))
	for _, tc := range []struct {
		name  string
		image string // "" for none
		krg   func(path string) error
		err   string // "" for a good root
	}{
		{"good", image, func(p string) error { return os.WriteFile(p, []byte(krg), 0o755) }, ""},
		{"not ours", "", nil, "not made by krgimage build"},
		{"damaged", "{", nil, "image.json is damaged"},
		{"no krg", image, func(string) error { return nil }, "no usable /usr/sbin/krg"},
		{"another krg", image, func(p string) error { return os.WriteFile(p, []byte("other"), 0o755) }, "doesn't belong to its image"},
		{"krg is a link", image, func(p string) error { return os.Symlink("/bin/true", p) }, "no usable /usr/sbin/krg"},
		{"krg is a pipe", image, func(p string) error { return unix.Mkfifo(p, 0o644) }, "not a regular file"},
		{"krg is a directory", image, func(p string) error { return os.Mkdir(p, 0o755) }, "not a regular file"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root, binary := t.TempDir(), filepath.Join(t.TempDir(), "krg")
			for _, d := range []string{"etc/krgimage", "usr/sbin"} {
				if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if tc.image != "" {
				if err := os.WriteFile(filepath.Join(root, imageFile), []byte(tc.image), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if tc.krg != nil {
				if err := tc.krg(filepath.Join(root, krgFile)); err != nil {
					t.Fatal(err)
				}
			}
			got, err := checkRoot(root, binary)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || rescue.HintOf(err) == "" {
					t.Errorf("error = %v (hint %q), want %q with a hint", err, rescue.HintOf(err), tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(binary)
			if err != nil || string(text) != krg || got.KernelRelease != "6.12" {
				t.Errorf("copied %q, %v; image %+v", text, err, got)
			}
		})
	}
}

func testBoot(line string) *boot {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	return &boot{log: log, cmd: cmdline.Parse(line), timeline: bootlog.NewTimeline(log, retry.System{}, bootlog.Uptime, nil), stopPost: func() {}}
}

func TestIdentify(t *testing.T) {
	head := &settings.Settings{SessionID: 9, NodeID: 8, Hostname: "krg-8", Domain: "krg"}
	for _, tc := range []struct {
		name, line string
		head       *settings.Settings
		dhcpName   string
		want       cmdline.Identity
		hostname   string
		err        error
	}{
		{name: "command line", line: "session_id=1 node_id=7", want: cmdline.Identity{SessionID: 1, NodeID: 3}, hostname: "node-3"},
		{name: "no automatic id", line: "session_id=1 node_id=7 autonodeid=0", dhcpName: "seven", want: cmdline.Identity{SessionID: 1, NodeID: 7}, hostname: "seven"},
		{name: "the head fills in", line: "autonodeid=0", head: head, want: cmdline.Identity{SessionID: 9, NodeID: 8}, hostname: "krg-8"},
		{name: "the command line counts", line: "session_id=1 node_id=7 autonodeid=0", head: head, want: cmdline.Identity{SessionID: 1, NodeID: 7}, hostname: "krg-8"},
		{name: "no session", line: "node_id=7", err: cmdline.ErrIncompleteIDs},
		{name: "no node", line: "session_id=7 autonodeid=0", dhcpName: "bad name!", err: cmdline.ErrIncompleteIDs},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := testBoot(tc.line)
			b.hand.Settings = tc.head
			b.hand.Lease = lease.Lease{Address: netip.MustParsePrefix("10.77.0.3/24"), Hostname: tc.dhcpName}
			err := b.identify()
			if !errors.Is(err, tc.err) {
				t.Fatalf("error = %v, want %v", err, tc.err)
			}
			if err == nil && (b.hand.Identity != tc.want || b.hand.Hostname != tc.hostname) {
				t.Errorf("%+v %q, want %+v %q", b.hand.Identity, b.hand.Hostname, tc.want, tc.hostname)
			}
		})
	}
}

func TestMeetHeadFallsBack(t *testing.T) {
	for name, url := range map[string]string{"no head": "", "nonsense": "tftp://x"} {
		b := testBoot("")
		b.hand.Lease.HeadURL = url
		b.meetHead(context.Background())
		if b.hand.Settings != nil || b.head != nil {
			t.Errorf("%s: settings %+v", name, b.hand.Settings)
		}
	}
}

func TestWaitingFor(t *testing.T) {
	mac := func(b byte) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, 0, b} }
	link := func(name string, b byte) netlink.Link {
		return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac(b)}}
	}
	for _, tc := range []struct {
		name, line string
		seen       map[int]netlink.Link
		want       string
	}{
		{"no card", "", nil, "no network card; is its driver in the initramfs"},
		{"no cable", "", map[int]netlink.Link{1: link("eth0", 1)}, "eth0 02:00:00:00:00:01 (no carrier); check the cable"},
		{"another card", "BOOTIF=01-02-00-00-00-00-09", map[int]netlink.Link{1: link("eth0", 1)}, "no interface has the address 02:00:00:00:00:09 of BOOTIF; there are: eth0 02:00:00:00:00:01 (not the boot interface)"},
		{"another name", "ip=:::::eth7:dhcp", map[int]netlink.Link{1: link("eth0", 1)}, "no interface is called eth7"},
	} {
		if got := waitingFor(cmdline.Parse(tc.line), tc.seen); !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
