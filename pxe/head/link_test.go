package head

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/insomniacslk/dhcp/iana"
	tftpclient "github.com/pin/tftp/v3"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"krgimage/configs"
	"krgimage/pxe/dhcp"
	"krgimage/pxe/httpboot"
	"krgimage/pxe/nodes"
	"krgimage/pxe/ra"
)

// The tests of a real interface run in a network namespace of their own: the
// test program starts itself again there. The nodes' end of the cable is in a
// second namespace, which one locked thread lives in (see node).
const inNamespace = "KRGIMAGE_TEST_IN_NAMESPACE"

const (
	headIf, nodeIf = "krghead0", "krgnode0"
	headAddr       = "10.77.0.254"
)

func TestLink(t *testing.T) {
	if os.Getenv(inNamespace) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root: network namespaces, packet sockets and ports below 1024")
		}
		cmd := exec.Command(os.Args[0], "-test.run=^TestLink$", "-test.v")
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, syscall.EPERM) {
			t.Skip("network namespaces can't be made here")
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	n := plugIn(t)
	t.Run("checks", checks)
	address(t, nil, headIf, headAddr+"/24")
	t.Run("ports", portTaken)
	t.Run("boot", func(t *testing.T) { bootOverLink(t, n) })
	t.Run("foreign", func(t *testing.T) { foreignServer(t, n) })
}

// node is the thread at the other end of the cable.
type node struct {
	work   chan func()
	handle *netlink.Handle
	ifi    *net.Interface
}

// do runs f in the node's namespace. Everything that opens a socket must happen
// in f's own goroutine.
func (n *node) do(f func()) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); f() }
	<-done
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plugIn makes a cable between two namespaces. The head's end is left down and
// without address.
func plugIn(t *testing.T) *node {
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: headIf}, PeerName: nodeIf}))
	n := &node{work: make(chan func())}
	namespace := make(chan string)
	go func() {
		runtime.LockOSThread() // for good: the thread is not fit for anything else
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			namespace <- ""
			return
		}
		namespace <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		for f := range n.work {
			f()
		}
	}()
	path := <-namespace
	ns, err := os.Open(path)
	must(t, err)
	defer ns.Close()
	peer, err := netlink.LinkByName(nodeIf)
	must(t, err)
	must(t, netlink.LinkSetNsFd(peer, int(ns.Fd())))
	n.do(func() {
		n.handle, err = netlink.NewHandle()
		if err == nil {
			err = up(n.handle, nodeIf)
		}
		if err == nil {
			n.ifi, err = net.InterfaceByName(nodeIf)
		}
	})
	must(t, err)
	return n
}

func up(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return h.LinkSetUp(l)
}

func address(t *testing.T, h *netlink.Handle, name, cidr string) {
	t.Helper()
	var err error
	if h == nil {
		h, err = netlink.NewHandle()
		must(t, err)
	}
	l, err := h.LinkByName(name)
	must(t, err)
	a, err := netlink.ParseAddr(cidr)
	must(t, err)
	must(t, h.AddrReplace(l, a))
}

func network() configs.Network {
	n := configs.Default().Network
	n.Head, n.Interface = netip.MustParseAddr(headAddr), headIf
	return n
}

func checks(t *testing.T) {
	without := network()
	without.Interface = ""
	none := network()
	none.Interface = "eth77"
	for _, tt := range []struct {
		net  configs.Network
		want string
	}{
		{none, "there is no network interface eth77"},
		{without, "ip addr add 10.77.0.254/24 dev INTERFACE"},
		{network(), "ip link set krghead0 up"},
	} {
		if _, err := OpenLink(tt.net, nil); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("OpenLink = %v, want %q", err, tt.want)
		}
	}
	h, err := netlink.NewHandle()
	must(t, err)
	must(t, up(h, headIf))
	if _, err := OpenLink(network(), nil); err == nil || !strings.Contains(err.Error(), "ip addr add 10.77.0.254/24 dev krghead0") {
		t.Errorf("without address: %v", err)
	}
}

// linkConfig is a head on the cable. Unless another server is expected the search
// for one is cut short.
func linkConfig(t *testing.T, wait time.Duration) Config {
	t.Helper()
	n := network()
	n.Interface = "" // found by its address
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	link, err := OpenLink(n, log)
	must(t, err)
	link.wait = wait
	cfg := Config{Cluster: configs.Default(), Image: image(t), StateDir: t.TempDir(), Network: link, NFS: nfsFunc(untilDone), Log: log}
	cfg.Cluster.Network.Head = n.Head
	return cfg
}

const short = 200 * time.Millisecond

func portTaken(t *testing.T) {
	cfg := linkConfig(t, short)
	for _, port := range []int{portDHCP, portTFTP} {
		conn, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
		must(t, err)
		err = Run(t.Context(), cfg, nil)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), fmt.Sprintf("ss -lnp 'sport = :%d'", port)) {
			t.Errorf("UDP port %d taken: %v", port, err)
		}
		conn.Close()
	}
	l, err := net.Listen("tcp4", ":80")
	must(t, err)
	defer l.Close()
	if err := Run(t.Context(), cfg, nil); err == nil || !strings.Contains(err.Error(), "network.http_port") {
		t.Errorf("TCP port 80 taken: %v", err)
	}
	// What the failed starts had opened is closed again.
	l.Close()
	_, stop := run(t, cfg)
	must(t, stop())
}

// bootOverLink plays a UEFI machine from its firmware to its node.
func bootOverLink(t *testing.T, n *node) {
	cfg := linkConfig(t, short)
	h, stop := run(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dhcpDo := func(f func(*nclient4.Client)) {
		t.Helper()
		n.do(func() {
			c, err := nclient4.New(nodeIf, nclient4.WithTimeout(5*time.Second))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			f(c)
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	request := func(c *nclient4.Client, m ...dhcpv4.Modifier) *nclient4.Lease {
		lease, err := c.Request(ctx, m...)
		if err != nil {
			t.Errorf("DHCP: %v", err)
			return &nclient4.Lease{Offer: &dhcpv4.DHCPv4{}, ACK: &dhcpv4.DHCPv4{}}
		}
		return lease
	}
	class := dhcpv4.WithOption(dhcpv4.OptClassIdentifier("PXEClient:Arch:00007:UNDI:003016"))
	arch := dhcpv4.WithOption(dhcpv4.OptClientArch(iana.EFI_X86_64))
	var lease *nclient4.Lease
	dhcpDo(func(c *nclient4.Client) { lease = request(c, class, arch) })
	if got := lease.ACK.YourIPAddr.String() + " " + lease.ACK.BootFileName + " " + lease.ACK.ServerIPAddr.String(); got != "10.77.0.1 snponly.efi 10.77.0.254" {
		t.Fatalf("the firmware gets %s", got)
	}
	address(t, n.handle, nodeIf, "10.77.0.1/24")

	var loader bytes.Buffer
	n.do(func() {
		c, err := tftpclient.NewClient(headAddr + ":69")
		if err != nil {
			t.Error(err)
			return
		}
		c.SetTimeout(5 * time.Second)
		c.SetBlockSize(1468)
		from, err := c.Receive("snponly.efi", "octet")
		if err == nil {
			_, err = from.WriteTo(&loader)
		}
		if err != nil {
			t.Error(err)
		}
	})
	if loader.String() != "content of snponly.efi" {
		t.Fatalf("loader %q", &loader)
	}

	dhcpDo(func(c *nclient4.Client) {
		lease = request(c, class, arch, dhcpv4.WithUserClass("iPXE", false),
			dhcpv4.WithOption(dhcpv4.OptGeneric(dhcpv4.GenericOptionCode(175), []byte{19, 1, 1})))
	})
	// Plain iPXE URLs: every request on a connection of its own.
	do := func(method, url string, body io.Reader) (int, string) {
		t.Helper()
		var conn net.Conn
		var err error
		n.do(func() { conn, err = net.Dial("tcp4", headAddr+":80") })
		must(t, err)
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}}
		req, err := http.NewRequestWithContext(ctx, method, url, body)
		must(t, err)
		resp, err := c.Do(req)
		must(t, err)
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		must(t, err)
		return resp.StatusCode, string(data)
	}
	const base = "http://" + headAddr + ":80"
	if _, script := do("GET", lease.ACK.BootFileName, nil); !strings.Contains(script, "session_id=1 node_id=1 ") {
		t.Fatalf("script at %s:\n%s", lease.ACK.BootFileName, script)
	}
	for _, name := range []string{"vmlinuz", "initramfs.img"} {
		if _, got := do("GET", base+"/"+name, nil); got != "content of "+name {
			t.Errorf("%s is %q", name, got)
		}
	}

	// Stage 1 has no vendor class and finds the head by option 224.
	dhcpDo(func(c *nclient4.Client) {
		lease = request(c)
		if url := string(lease.ACK.Options.Get(dhcp.OptionHeadURL)); url != base {
			t.Errorf("head URL %q", url)
		}
		if lease.ACK.HostName() != "krg-1" || lease.ACK.DomainName() != "krg" || lease.ACK.BootFileName != "" {
			t.Errorf("stage 1 gets %s", lease.ACK.Summary())
		}
	})
	dhcpDo(func(c *nclient4.Client) { // unicast, from the node's own address
		conn, err := net.ListenPacket("udp4", "10.77.0.1:68")
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		renew, err := dhcpv4.NewRenewFromAck(lease.ACK)
		if err == nil {
			_, err = conn.WriteTo(renew.ToBytes(), &net.UDPAddr{IP: net.ParseIP(headAddr), Port: 67})
		}
		buf := make([]byte, 1500)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		size := 0
		if err == nil {
			size, _, err = conn.ReadFrom(buf)
		}
		if err != nil {
			t.Errorf("renewal: %v", err)
			return
		}
		if ack, err := dhcpv4.FromBytes(buf[:size]); err != nil || ack.MessageType() != dhcpv4.MessageTypeAck {
			t.Errorf("renewal: %v %v", ack, err)
		}
	})
	code, body := do("GET", base+"/v1/node", nil)
	var settings httpboot.Settings
	if err := json.Unmarshal([]byte(body), &settings); err != nil || settings.NodeID != 1 || settings.Address.String() != "10.77.0.1/24" {
		t.Errorf("settings: %d %s %v", code, body, err)
	}
	for _, s := range []string{"stage1", "root", "ready"} {
		if code, body := do("POST", base+"/v1/node/stage", strings.NewReader(`{"stage":"`+s+`","uptime_ms":1000}`)); code != 204 {
			t.Errorf("stage %s: %d %s", s, code, body)
		}
	}

	known, ok := h.Nodes().Lookup(configs.MAC(n.ifi.HardwareAddr.String()))
	if !ok || known.Boot == nil {
		t.Fatalf("the registry has %+v", known)
	}
	for _, s := range []nodes.Stage{nodes.StageDHCP, nodes.StageLoader, nodes.StageIPXE, nodes.StageScript, nodes.StageKernel, nodes.StageInitramfs, nodes.StageStage1, nodes.StageRoot, nodes.StageReady} {
		if _, ok := known.Boot.Find(s); !ok {
			t.Errorf("stage %s is missing from %+v", s, known.Boot.Events)
		}
	}
	advertised(t, n)
	must(t, stop())
	if data, err := os.ReadFile(filepath.Join(cfg.StateDir, "head", "nodes.json")); err != nil || !strings.Contains(string(data), `"ready"`) {
		t.Errorf("after the end the node file holds %s, %v", data, err)
	}
}

// advertised asks for a router as a machine without an address does.
func advertised(t *testing.T, n *node) {
	t.Helper()
	n.do(func() {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0xdd86)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		timeout := unix.Timeval{Sec: 10}
		err = errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0xdd86, Ifindex: n.ifi.Index}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
		solicitation := []byte{0x33, 0x33, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255,
			/* from :: */ 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
			/* to ff02::2 */ 0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
			133, 0, 0x7b, 0xb8, 0, 0, 0, 0}
		if ra.Reply(solicitation, n.ifi.HardwareAddr) == nil {
			t.Error("the test's solicitation is wrong")
		}
		if _, werr := unix.Write(fd, solicitation); err != nil || werr != nil {
			t.Error(err, werr)
			return
		}
		for buf := make([]byte, 2048); ; {
			size, err := unix.Read(fd, buf)
			if err != nil {
				t.Errorf("no router advertisement: %v", err)
				return
			}
			if size > 60 && buf[20] == 58 && buf[54] == 134 && buf[0] == 0x33 {
				if lifetime := buf[60:62]; !bytes.Equal(lifetime, []byte{0, 0}) {
					t.Errorf("router lifetime %x", lifetime)
				}
				return
			}
		}
	})
}

// foreignServer puts a second DHCP server on the cable.
func foreignServer(t *testing.T, n *node) {
	other := configs.Default()
	other.Network.Head = netip.MustParseAddr("10.77.0.200")
	registry, err := nodes.Open(nodes.Config{Cluster: other, File: filepath.Join(t.TempDir(), "nodes.json")})
	must(t, err)
	address(t, n.handle, nodeIf, "10.77.0.200/24")
	var conn net.PacketConn
	n.do(func() {
		var l *Link
		if l, err = OpenLink(other.Network, nil); err == nil {
			conn, err = l.ListenUDP(portDHCP)
		}
	})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	server := dhcp.New(dhcp.Config{Cluster: other, Nodes: anyone{registry}})
	go func() { ended <- server.Serve(ctx, conn) }()
	t.Cleanup(func() { cancel(); must(t, <-ended) })

	cfg := linkConfig(t, time.Minute)
	foreign := (*dhcp.ForeignServerError)(nil)
	if err := Run(t.Context(), cfg, nil); !errors.As(err, &foreign) || foreign.Server != other.Network.Head || foreign.Interface != headIf {
		t.Fatalf("beside another server: %v", err)
	}
	for _, want := range []string{"10.77.0.200", headIf, "--force"} {
		if !strings.Contains(foreign.Error(), want) {
			t.Errorf("the error does not name %s: %v", want, foreign)
		}
	}
	cfg.Force = true
	_, stop := run(t, cfg)
	must(t, stop())
}

// anyone is a server that gives every machine an address, as most do.
type anyone struct{ *nodes.Registry }

func (a anyone) Lookup(mac configs.MAC) (nodes.Node, bool) {
	n, err := a.Assign(mac)
	return n, err == nil
}
