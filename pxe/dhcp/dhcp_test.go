package dhcp

import (
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

var update = flag.Bool("update", false, "write the golden files anew")

const mac = configs.MAC("52:54:00:12:34:56") // of the captured packets

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func cluster() configs.Cluster {
	c := configs.Default()
	c.Network.Head = netip.MustParseAddr("10.77.0.254")
	return c
}

// rig is a server with a real registry and a clock that stands still.
type rig struct {
	*Server
	nodes *nodes.Registry
	log   *strings.Builder
	now   time.Time
}

func newRig(t testing.TB, c configs.Cluster) *rig {
	t.Helper()
	r := &rig{log: &strings.Builder{}, now: epoch}
	clock := func() time.Time { return r.now }
	var err error
	r.nodes, err = nodes.Open(nodes.Config{Cluster: c, File: filepath.Join(t.TempDir(), "nodes.json"), Now: clock})
	if err != nil {
		t.Fatal(err)
	}
	r.Server = New(Config{Cluster: c, Nodes: r.nodes, Now: clock, Log: slog.New(slog.NewTextHandler(r.log, nil))})
	return r
}

func rawPacket(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := hex.DecodeString(strings.ReplaceAll(string(text), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// packet is a captured packet, with what the modifiers change. A captured REQUEST
// is turned to this server and its address.
func packet(t testing.TB, name string, modifiers ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	p, err := dhcpv4.FromBytes(rawPacket(t, name))
	if err != nil {
		t.Fatal(err)
	}
	if p.MessageType() == dhcpv4.MessageTypeRequest {
		server("10.77.0.254")(p)
		wants("10.77.0.1")(p)
	}
	for _, m := range modifiers {
		m(p)
	}
	return p
}

func server(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(a)))
}

func wants(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(a)))
}

// linux is what a plain DHCP client sends (udhcpc, the client of stage 1).
func linux(t testing.TB, kind dhcpv4.MessageType, modifiers ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	p, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithTransactionID(dhcpv4.TransactionID{1, 2, 3, 4}),
		dhcpv4.WithHwAddr(mac.HardwareAddr()),
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("udhcp 1.37.0")),
		dhcpv4.WithOption(dhcpv4.OptClientIdentifier(append([]byte{1}, mac.HardwareAddr()...))),
	}, modifiers...)...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// dump prints a packet as it is on the wire, every byte of it.
func dump(p *dhcpv4.DHCPv4, to *net.UDPAddr) string {
	if p == nil {
		return "nothing\n"
	}
	p, err := dhcpv4.FromBytes(p.ToBytes())
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "to %s\nop %d htype %d hops %d xid %x secs %d flags %04x\n", to, p.OpCode, p.HWType, p.HopCount, p.TransactionID[:], p.NumSeconds, p.Flags)
	fmt.Fprintf(&b, "ciaddr %s yiaddr %s siaddr %s giaddr %s chaddr %s\n", p.ClientIPAddr, p.YourIPAddr, p.ServerIPAddr, p.GatewayIPAddr, p.ClientHWAddr)
	fmt.Fprintf(&b, "sname %q\nfile %q\n", p.ServerHostName, p.BootFileName)
	for _, code := range slices.Sorted(maps.Keys(p.Options)) {
		v := p.Options[code]
		if strings.IndexFunc(string(v), func(r rune) bool { return r < ' ' || r > '~' }) < 0 {
			fmt.Fprintf(&b, "%d %q\n", code, v)
		} else {
			fmt.Fprintf(&b, "%d %x\n", code, v)
		}
	}
	return b.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("answer differs from %s (-want +got):\n%s", path, diff)
	}
}

func TestAnswers(t *testing.T) {
	known := func(c *configs.Cluster) { c.Nodes.Table = []configs.Node{{MAC: mac, ID: 1}} }
	full := func(c *configs.Cluster) {
		known(c)
		c.Network.Gateway = netip.MustParseAddr("10.77.0.253")
		c.Network.DNS = []netip.Addr{netip.MustParseAddr("10.77.0.253"), netip.MustParseAddr("9.9.9.9")}
	}
	pxelinux := func(c *configs.Cluster) { c.Boot.BIOS = "pxelinux" }
	always := func(c *configs.Cluster) { c.Boot.Chain = "always" }
	noHTTP := dhcpv4.WithOption(dhcpv4.OptGeneric(optionIPXE, []byte{0x15, 1, 1}))
	for _, tt := range []struct {
		name    string
		cluster func(*configs.Cluster)
		request *dhcpv4.DHCPv4
	}{
		{"ipxe-bios-offer", nil, packet(t, "ipxe-bios-discover")},
		{"ipxe-bios-ack", known, packet(t, "ipxe-bios-request")},
		{"ipxe-bios-always", always, packet(t, "ipxe-bios-discover")},
		{"ipxe-bios-without-http", nil, packet(t, "ipxe-bios-discover", noHTTP)},
		{"ipxe-bios-pxelinux", pxelinux, packet(t, "ipxe-bios-discover")},
		{"ipxe-uefi-offer", nil, packet(t, "ipxe-uefi-discover")},
		{"ipxe-uefi-pxelinux", pxelinux, packet(t, "ipxe-uefi-discover")},
		{"pxe-bios-offer", nil, packet(t, "uefi-pxe-discover", dhcpv4.WithOption(dhcpv4.OptClientArch(iana.INTEL_X86PC)))},
		{"uefi-pxe-offer", nil, packet(t, "uefi-pxe-discover")},
		{"uefi-pxe-ack", known, packet(t, "uefi-pxe-request")},
		{"uefi-http-offer", nil, packet(t, "uefi-http-discover")},
		{"uefi-arm64-offer", nil, packet(t, "uefi-pxe-discover", dhcpv4.WithOption(dhcpv4.OptClientArch(iana.EFI_ARM64)))},
		{"linux-unknown", nil, linux(t, dhcpv4.MessageTypeDiscover)},
		{"linux-offer", full, linux(t, dhcpv4.MessageTypeDiscover)},
		{"linux-ack", full, linux(t, dhcpv4.MessageTypeRequest, server("10.77.0.254"), wants("10.77.0.1"))},
		{"stage1-unknown", nil, linux(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithOption(dhcpv4.OptClassIdentifier("krg")))},
		{"nak", known, linux(t, dhcpv4.MessageTypeRequest, server("10.77.0.254"), wants("10.77.0.2"))},
		{"nak-after-reboot", known, linux(t, dhcpv4.MessageTypeRequest, wants("192.168.1.5"))},
		{"nak-renewal", known, linux(t, dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(net.IPv4(192, 168, 1, 5)))},
		{"ack-after-reboot", known, linux(t, dhcpv4.MessageTypeRequest, wants("10.77.0.1"))},
		{"ack-renewal", known, linux(t, dhcpv4.MessageTypeRequest, dhcpv4.WithClientIP(net.IPv4(10, 77, 0, 1)))},
		{"other-server", known, linux(t, dhcpv4.MessageTypeRequest, server("10.77.0.9"), wants("10.77.0.1"))},
		{"request-unknown", nil, packet(t, "ipxe-bios-request")},
		{"inform", known, linux(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(net.IPv4(10, 77, 0, 1)))},
		{"inform-elsewhere", known, linux(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(net.IPv4(10, 77, 0, 7)))},
		{"relayed", known, linux(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithGatewayIP(net.IPv4(10, 0, 0, 1)))},
		{"no-type", known, linux(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithoutOption(dhcpv4.OptionDHCPMessageType))},
		{"a-reply", known, linux(t, dhcpv4.MessageTypeOffer, func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply })},
		{"group-address", nil, packet(t, "ipxe-bios-discover", dhcpv4.WithHwAddr(net.HardwareAddr{1, 0, 0, 0, 0, 1}))},
		{"zero-address", nil, packet(t, "ipxe-bios-discover", dhcpv4.WithHwAddr(make(net.HardwareAddr, 6)))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := cluster()
			if tt.cluster != nil {
				tt.cluster(&c)
			}
			r := newRig(t, c)
			got, to := r.Handle(tt.request)
			golden(t, tt.name, dump(got, to))
			if got != nil && got.ClassIdentifier() == classPXE {
				t.Error("option 60 PXEClient makes UEFI firmware look for a boot server")
			}
			if got != nil && len(got.ToBytes()) > 576 {
				t.Errorf("answer of %d bytes: a client need not take more than 576 (RFC 2131 §2)", len(got.ToBytes()))
			}
		})
	}
}

func TestChainAlwaysDoesNotLoop(t *testing.T) {
	c := cluster()
	c.Boot.Chain = "always"
	r := newRig(t, c)
	ask := func() string {
		t.Helper()
		got, _ := r.Handle(packet(t, "ipxe-bios-discover"))
		ack, _ := r.Handle(packet(t, "ipxe-bios-request"))
		if got.BootFileName != ack.BootFileName {
			t.Fatalf("offered %q, then %q", got.BootFileName, ack.BootFileName)
		}
		return got.BootFileName
	}
	const script = "http://10.77.0.254:80/boot.ipxe?mac=52-54-00-12-34-56"
	if got := ask(); got != LoaderBIOSFull {
		t.Fatalf("the firmware's own iPXE gets %q", got)
	}
	if n, _ := r.nodes.Lookup(mac); n.Stage() != nodes.StageDHCP {
		t.Errorf("after the firmware's DHCP the stage is %q", n.Stage())
	}
	r.nodes.Saw(mac, nodes.StageLoader, LoaderBIOS)
	r.now = r.now.Add(5 * time.Second)
	if got := ask(); got != script {
		t.Fatalf("the loaded iPXE gets %q", got)
	}
	if n, _ := r.nodes.Lookup(mac); n.Stage() != nodes.StageIPXE {
		t.Errorf("after iPXE's DHCP the stage is %q", n.Stage())
	}
	r.nodes.Saw(mac, nodes.StageScript, "")
	r.now = r.now.Add(time.Minute)
	if got := ask(); got != LoaderBIOSFull {
		t.Fatalf("after a reset it gets %q", got)
	}
	r.nodes.Saw(mac, nodes.StageLoader, LoaderBIOSFull)
	r.now = r.now.Add(time.Hour)
	if got := ask(); got != LoaderBIOSFull {
		t.Fatalf("an hour after the loader it gets %q", got)
	}
}

func TestLeases(t *testing.T) {
	r := newRig(t, cluster())
	leased := func() bool { _, ok := r.nodes.ByAddress(netip.MustParseAddr("10.77.0.1")); return ok }
	r.Handle(packet(t, "ipxe-bios-discover"))
	if leased() {
		t.Error("an offer counts as a lease")
	}
	r.Handle(packet(t, "ipxe-bios-request"))
	if n, _ := r.nodes.Lookup(mac); !leased() || !n.LeaseUntil.Equal(epoch.Add(12*time.Hour)) {
		t.Errorf("after the ACK: %+v", n)
	}
	release := func(client, srv string) {
		r.Handle(linux(t, dhcpv4.MessageTypeRelease, dhcpv4.WithClientIP(net.ParseIP(client)), server(srv)))
	}
	release("10.77.0.2", "10.77.0.254")
	release("10.77.0.1", "10.77.0.253")
	if !leased() {
		t.Error("another's release ends the lease")
	}
	release("10.77.0.1", "10.77.0.254")
	if leased() {
		t.Error("the release is not heard")
	}
	r.Handle(packet(t, "ipxe-bios-request"))
	r.Handle(linux(t, dhcpv4.MessageTypeDecline, server("10.77.0.254"), wants("10.77.0.1")))
	if leased() || !strings.Contains(r.log.String(), "another one uses its address 10.77.0.1") {
		t.Errorf("the decline is not heard:\n%s", r.log)
	}
}

func TestRefusalIsLoggedOnceAMinute(t *testing.T) {
	c := cluster()
	c.Nodes.Unknown = "refuse"
	r := newRig(t, c)
	for range 100 {
		if got, _ := r.Handle(packet(t, "ipxe-bios-discover")); got != nil {
			t.Fatal("a refused machine is answered")
		}
	}
	if n := strings.Count(r.log.String(), string(mac)); n != 1 {
		t.Errorf("%d lines, want 1:\n%s", n, r.log)
	}
	r.now = r.now.Add(2 * time.Minute)
	r.Handle(packet(t, "ipxe-bios-discover"))
	if n := strings.Count(r.log.String(), string(mac)); n != 2 {
		t.Errorf("%d lines two minutes later, want 2", n)
	}
	for i := range 5000 {
		r.Handle(packet(t, "ipxe-bios-discover", dhcpv4.WithHwAddr(net.HardwareAddr{2, 0, 0, 0, byte(i >> 8), byte(i)})))
	}
	if len(r.quiet) > 1024 {
		t.Errorf("made-up MACs fill the memory: %d", len(r.quiet))
	}
}

func TestClassify(t *testing.T) {
	option := func(code uint8, v string) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.GenericOptionCode(code), []byte(v)))
	}
	for _, tt := range []struct {
		name string
		p    *dhcpv4.DHCPv4
		want Client
	}{
		{"iPXE in a BIOS", packet(t, "ipxe-bios-discover"),
			Client{MAC: mac, VendorClass: "PXEClient:Arch:00000:UNDI:002001", UserClass: "iPXE", IPXE: true, IPXEHTTP: true}},
		{"iPXE in UEFI", packet(t, "ipxe-uefi-discover"),
			Client{MAC: mac, Arch: 7, VendorClass: "PXEClient:Arch:00007:UNDI:003010", UserClass: "iPXE", IPXE: true, IPXEHTTP: true}},
		{"UEFI PXE", packet(t, "uefi-pxe-discover"), Client{MAC: mac, Arch: 7, VendorClass: "PXEClient:Arch:00007:UNDI:003000"}},
		{"UEFI HTTP", packet(t, "uefi-http-discover"), Client{MAC: mac, Arch: 16, VendorClass: "HTTPClient:Arch:00016:UNDI:003000", HTTPBoot: true}},
		{"RFC 3004 user class", linux(t, dhcpv4.MessageTypeDiscover, option(77, "\x04iPXE")),
			Client{MAC: mac, VendorClass: "udhcp 1.37.0", UserClass: "iPXE", IPXE: true}},
		{"gPXE", packet(t, "uefi-pxe-discover", option(77, "gPXE")),
			Client{MAC: mac, Arch: 7, VendorClass: "PXEClient:Arch:00007:UNDI:003000", UserClass: "gPXE"}},
		{"architecture in the class only", packet(t, "uefi-pxe-discover", dhcpv4.WithoutOption(dhcpv4.OptionClientSystemArchitectureType)),
			Client{MAC: mac, Arch: 7, VendorClass: "PXEClient:Arch:00007:UNDI:003000"}},
		{"Linux", linux(t, dhcpv4.MessageTypeDiscover),
			Client{MAC: mac, VendorClass: "udhcp 1.37.0", NotNetboot: `vendor class "udhcp 1.37.0" is neither PXEClient nor HTTPClient`}},
		{"nothing said", linux(t, dhcpv4.MessageTypeDiscover, dhcpv4.WithoutOption(dhcpv4.OptionClassIdentifier)),
			Client{MAC: mac, NotNetboot: "no vendor class"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Classify(tt.p)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// FuzzHandle feeds whatever comes from the wire to the server, as Serve does.
func FuzzHandle(f *testing.F) {
	for _, name := range []string{"ipxe-bios-discover", "ipxe-bios-request", "uefi-pxe-discover", "uefi-http-discover"} {
		f.Add(rawPacket(f, name))
	}
	f.Add(linux(f, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(net.IPv4(10, 77, 0, 1))).ToBytes())
	// Nothing is discovered: a write to disk per packet would be all that is tested.
	c := cluster()
	c.Nodes.Unknown = "refuse"
	c.Nodes.Table = []configs.Node{{MAC: mac, ID: 1}}
	r := newRig(f, c)
	f.Fuzz(func(t *testing.T, data []byte) {
		request, err := dhcpv4.FromBytes(data)
		if err != nil {
			return
		}
		if len(data)%2 == 0 {
			request.ClientHWAddr = mac.HardwareAddr()
		}
		got, to := r.Handle(request)
		if got == nil {
			return
		}
		if to == nil {
			t.Fatal("an answer to nobody")
		}
		wire := got.ToBytes()
		if len(wire) > 1472 {
			t.Errorf("an answer of %d bytes does not fit a frame", len(wire))
		}
		back, err := dhcpv4.FromBytes(wire)
		if err != nil {
			t.Fatalf("the answer can't be read: %v", err)
		}
		if back.TransactionID != request.TransactionID || !bytes.Equal(back.ClientHWAddr, request.ClientHWAddr) {
			t.Error("the answer is to another question")
		}
		if y := toAddr(back.YourIPAddr); !y.IsUnspecified() && !r.net.Subnet.Contains(y) {
			t.Errorf("gave %s, outside the subnet", y)
		}
	})
}
