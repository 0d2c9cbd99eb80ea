package httpboot

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

var update = flag.Bool("update", false, "write the golden files anew")

const (
	macA = configs.MAC("52:54:00:00:00:0a")
	macB = configs.MAC("52:54:00:00:00:0b")
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

func cluster() configs.Cluster {
	c := configs.Default()
	c.Network.Head = netip.MustParseAddr("10.77.0.254")
	return c
}

// rig is a server with a real registry: macA is node 1 with a lease, macB node 2
// without one.
type rig struct {
	http.Handler
	nodes *nodes.Registry
}

const kernel = "kernel of thirty-three bytes size"

func newRig(t testing.TB) *rig {
	t.Helper()
	dir := t.TempDir()
	now := func() time.Time { return epoch }
	registry, err := nodes.Open(nodes.Config{Cluster: cluster(), File: filepath.Join(dir, "nodes.json"), Now: now})
	if err != nil {
		t.Fatal(err)
	}
	for _, mac := range []configs.MAC{macA, macB} {
		if _, err := registry.Assign(mac); err != nil {
			t.Fatal(err)
		}
	}
	registry.Leased(macA, epoch.Add(time.Hour))
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := cluster()
	s := New(Config{
		Cluster: c, Nodes: registry, Now: now, Root: HeadRoot(&c, "/"),
		Kernel: file("k", kernel), Initramfs: filepath.Join(dir, "missing"),
		Loaders: map[string]string{"snponly.efi": file("s", "efi")},
	})
	return &rig{s.Handler(), registry}
}

func (r *rig) do(from, method, target, body string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, target, strings.NewReader(body))
	req.RemoteAddr = from + ":1024"
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	r.ServeHTTP(w, req)
	return w
}

func (r *rig) stage(mac configs.MAC) nodes.Stage {
	n, _ := r.nodes.Lookup(mac)
	return n.Stage()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
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
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(*configs.Cluster, *nodes.Node)
		root *Root
		want string
	}{
		{"root on an existing server", nil, &Root{netip.MustParseAddr("10.0.0.5"), 2050, "/export/krg", []string{"mountport=20048", "noatime"}},
			"ro root=/dev/ram ip=dhcp nfsroot=10.0.0.5:/export/krg,port=2050,mountport=20048,noatime session_id=1 node_id=1 BOOTIF=01-52-54-00-00-00-0a"},
		{"as Kerrighed's", nil, nil, "ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/ session_id=1 node_id=1 BOOTIF=01-52-54-00-00-00-0a"},
		{"address does not end in the id", func(c *configs.Cluster, n *nodes.Node) { n.Address = netip.MustParseAddr("10.77.0.9") }, nil,
			"ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/ session_id=1 node_id=1 autonodeid=0 BOOTIF=01-52-54-00-00-00-0a"},
		{"wide subnet", func(c *configs.Cluster, n *nodes.Node) { n.Address = netip.MustParseAddr("10.77.1.1") }, nil,
			"ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/ session_id=1 node_id=1 BOOTIF=01-52-54-00-00-00-0a"},
		{"NFS elsewhere", func(c *configs.Cluster, n *nodes.Node) { c.Network.NFSPort, c.SessionID = 12049, 77 }, nil,
			"ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/,port=12049 session_id=77 node_id=1 BOOTIF=01-52-54-00-00-00-0a"},
		{"arguments", func(c *configs.Cluster, n *nodes.Node) {
			c.Kernel.Args = []string{"console=ttyS0,115200", " quiet  debug ", "a\nboot\x00", ""}
		}, nil,
			"ro root=/dev/ram ip=dhcp nfsroot=10.77.0.254:/ session_id=1 node_id=1 BOOTIF=01-52-54-00-00-00-0a console=ttyS0,115200 quiet debug a boot"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := cluster()
			c.Kernel.Args = nil
			n := nodes.Node{MAC: macA, ID: 1, Address: netip.MustParseAddr("10.77.0.1")}
			if tt.set != nil {
				tt.set(&c, &n)
			}
			root := HeadRoot(&c, "/")
			if tt.root != nil {
				root = *tt.root
			}
			if got := CommandLine(&c, n, root); got != tt.want {
				t.Errorf("\n got %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestPXELinuxConfig(t *testing.T) {
	c := cluster()
	golden(t, "pxelinux.golden", PXELinuxConfig(&c, nodes.Node{MAC: macA, ID: 1, Address: netip.MustParseAddr("10.77.0.1")}, HeadRoot(&c, "/")))
}

func TestScript(t *testing.T) {
	r := newRig(t)
	golden(t, "boot.ipxe.golden", r.do("10.77.0.1", "GET", "/boot.ipxe", "").Body.String())
	if got := r.stage(macA); got != nodes.StageScript {
		t.Errorf("stage %q", got)
	}
	for _, tt := range []struct{ name, from, query, want string }{
		{"the lease decides", "10.77.0.1", "?mac=" + string(macB), "node_id=1 "},
		{"by MAC", "10.77.0.99", "?mac=" + string(macB), "node_id=2 "},
		{"by MAC with dashes", "10.77.0.99", "?mac=52-54-00-00-00-0B", "node_id=2 "},
		{"unknown MAC", "10.77.0.99", "?mac=52-54-00-00-00-0c", "refused it"},
		{"no MAC", "10.77.0.99", "", "refused it"},
		{"no MAC at all", "10.77.0.99", "?mac=" + url.QueryEscape("\x00%;"), "refused it"},
		{"InfiniBand", "10.77.0.99", "?mac=00:00:00:00:fe:80:00:00:00:00:00:00:02:00:5e:10:00:00:00:01", "refused it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := r.do(tt.from, "GET", "/boot.ipxe"+tt.query, "")
			if body := w.Body.String(); w.Code != 200 || !strings.HasPrefix(body, "#!ipxe\n") || !strings.Contains(body, tt.want) {
				t.Errorf("%d\n%s", w.Code, body)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	for _, tt := range []struct {
		name, method, target, ranges string
		code                         int
		body                         string
		stage                        nodes.Stage
	}{
		{"whole", "GET", "/vmlinuz", "", 200, kernel, nodes.StageKernel},
		{"head only", "HEAD", "/vmlinuz", "", 200, "", ""},
		{"first part", "GET", "/vmlinuz", "bytes=0-5", 206, "kernel", ""},
		{"last part", "GET", "/vmlinuz", "bytes=29-", 206, "size", nodes.StageKernel},
		{"past the end", "GET", "/vmlinuz", "bytes=99-", 416, "invalid range: failed to overlap\n", ""},
		{"loader", "GET", "/boot/snponly.efi", "", 200, "efi", nodes.StageLoader},
		{"no such loader", "GET", "/boot/undionly.kpxe", "", 404, "404 page not found\n", ""},
		{"file that is not there", "GET", "/initramfs.img", "", 404, "the head node has no such boot file; see its log\n", ""},
		{"way out", "GET", "/boot/../../etc/passwd", "", 307, "", ""},
		{"wrong method", "POST", "/vmlinuz", "", 405, "Method Not Allowed\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			w := r.do("10.77.0.1", tt.method, tt.target, "", "Range", tt.ranges)
			if w.Code != tt.code || (tt.body != "" && w.Body.String() != tt.body) {
				t.Errorf("%d %q, want %d %q", w.Code, w.Body, tt.code, tt.body)
			}
			if got := r.stage(macA); got != tt.stage {
				t.Errorf("stage %q, want %q", got, tt.stage)
			}
		})
	}
}

// halfway is a client that goes away in the middle of a file.
type halfway struct {
	*httptest.ResponseRecorder
	left int
}

func (h *halfway) Write(p []byte) (int, error) {
	if len(p) > h.left {
		return h.left, fmt.Errorf("connection reset")
	}
	h.left -= len(p)
	return h.ResponseRecorder.Write(p)
}

func TestBrokenTransferIsNoStage(t *testing.T) {
	r := newRig(t)
	req := httptest.NewRequest("GET", "/vmlinuz", nil)
	req.RemoteAddr = "10.77.0.1:1"
	r.ServeHTTP(&halfway{httptest.NewRecorder(), 10}, req)
	if got := r.stage(macA); got != "" {
		t.Errorf("stage %q", got)
	}
}

func TestSettings(t *testing.T) {
	r := newRig(t)
	w := r.do("10.77.0.1", "GET", "/v1/node", "")
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, w.Body.Bytes(), "", "  "); err != nil {
		t.Fatalf("%d %s: %v", w.Code, w.Body, err)
	}
	golden(t, "node.golden", pretty.String())
	for _, from := range []string{"10.77.0.2", "10.77.0.99", "192.168.1.1"} {
		if w := r.do(from, "GET", "/v1/node", ""); w.Code != http.StatusForbidden {
			t.Errorf("%s gets %d", from, w.Code)
		}
	}
}

func TestStage(t *testing.T) {
	for _, tt := range []struct {
		name, from, body string
		code             int
	}{
		{"good", "10.77.0.1", `{"stage":"link","uptime_ms":1234,"detail":"eth0 1000 Mb/s"}`, 204},
		{"field of a later node", "10.77.0.1", `{"stage":"link","uptime_ms":1234,"detail":"eth0 1000 Mb/s","mtu":1500}`, 204},
		{"no lease", "10.77.0.2", `{"stage":"link","uptime_ms":1234}`, 403},
		{"outside", "192.168.1.1", `{"stage":"link","uptime_ms":1234}`, 403},
		{"the head's stage", "10.77.0.1", `{"stage":"kernel"}`, 400},
		{"no stage", "10.77.0.1", `{}`, 400},
		{"not JSON", "10.77.0.1", `stage=link`, 400},
		{"nothing", "10.77.0.1", ``, 400},
		{"negative", "10.77.0.1", `{"stage":"link","uptime_ms":-1}`, 400},
		{"too long ago", "10.77.0.1", `{"stage":"link","uptime_ms":9223372036854775807}`, 400},
		{"too large", "10.77.0.1", `{"stage":"link","detail":"` + strings.Repeat("x", maxStageBody) + `"}`, 413},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			w := r.do(tt.from, "POST", "/v1/node/stage", tt.body)
			if w.Code != tt.code {
				t.Fatalf("%d %s, want %d", w.Code, w.Body, tt.code)
			}
			n, _ := r.nodes.Lookup(macA)
			if e, ok := n.Boot.Find(nodes.StageLink); ok != (tt.code == 204) || ok && (e.Detail != "eth0 1000 Mb/s" || e.UptimeMS != 1234) {
				t.Errorf("noted %+v", n.Boot)
			}
		})
	}
}

func FuzzParseStage(f *testing.F) {
	f.Add([]byte(`{"stage":"link","uptime_ms":1234,"detail":"eth0 1000 Mb/s"}`))
	f.Add([]byte(`{"stage":"ready","uptime_ms":1e3}`))
	r := newRig(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		report, err := ParseStage(body)
		if err != nil {
			return
		}
		if err := r.nodes.Report(macA, report.Stage, time.Duration(report.UptimeMS)*time.Millisecond, report.Detail); err != nil {
			t.Errorf("parsed, but refused: %v", err)
		}
		n, _ := r.nodes.Lookup(macA)
		for _, e := range n.Boot.Events {
			if e.Detail != nodes.Clean(e.Detail) {
				t.Errorf("detail %q", e.Detail)
			}
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add("mac=52-54-00-00-00-0a", "bytes=0-5")
	f.Add("mac=%zz&mac=;", "bytes=-1,2-3")
	r := newRig(f)
	f.Fuzz(func(t *testing.T, query, ranges string) {
		for _, path := range []string{"/boot.ipxe", "/vmlinuz"} {
			req := httptest.NewRequest("GET", path, nil)
			req.RemoteAddr, req.URL.RawQuery = "10.77.0.99:1", query
			req.Header.Set("Range", ranges)
			w := httptest.NewRecorder()
			r.ServeHTTP(w, req)
			if w.Code >= 500 {
				t.Errorf("%s: %d", path, w.Code)
			}
			if path == "/boot.ipxe" && !strings.HasPrefix(w.Body.String(), "#!ipxe\n") {
				t.Errorf("script %q", w.Body)
			}
		}
	})
}
