package coldplug

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// moduleDir is a small extract of Debian's files, with one bad line each.
func moduleDir() fstest.MapFS {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	return fstest.MapFS{
		"modules.dep": file(`kernel/drivers/net/virtio_net.ko: kernel/drivers/net/net_failover.ko kernel/net/core/failover.ko
kernel/drivers/net/net_failover.ko: kernel/net/core/failover.ko
kernel/net/core/failover.ko:
kernel/drivers/net/ethernet/realtek/r8169.ko: kernel/drivers/net/phy/libphy.ko
kernel/drivers/net/phy/libphy.ko:
kernel/drivers/net/phy/realtek.ko: kernel/drivers/net/phy/libphy.ko
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz
kernel/lib/crc16.ko.xz:
kernel/arch/x86/crypto/crc32c-intel.ko.xz:
kernel/drivers/input/evdev.ko:
kernel/a.ko:
kernel/b.ko:
kernel/pcspkr.ko:
no colon here
`),
		"modules.alias": file(`# Aliases extracted from modules themselves.
alias virtio:d00000001v* virtio_net
alias pci:v000010ECd00008168sv*sd*bc*sc*i* r8169
alias acpi*:PNP0C0C:* button
alias input:b*v*p*e*-e*k*r*a*m*l*s*f*w* evdev
alias crypto-crc32c crc32c_intel
alias platform:pcspkr pcspkr
alias of:N*T*Cfoo[12]C* a
bad line
`),
		"modules.softdep": file("softdep r8169 pre: realtek missing\nsoftdep ext4 pre: crypto-crc32c\nsoftdep cifs gcm\nsoftdep a post: b\nsoftdep b pre: a\n"),
		"modules.builtin": file("kernel/drivers/virtio/virtio_pci.ko\n"),
	}
}

func testIndex(t *testing.T) *Index {
	t.Helper()
	ix, err := ReadIndex(moduleDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := ix.ReadBlacklist(fstest.MapFS{"x.conf": {Data: []byte("# no noise\nblacklist pcspkr\noptions a b=1\n")}, "README": {Data: []byte("blacklist r8169")}}); err != nil {
		t.Fatal(err)
	}
	return ix
}

func TestMatch(t *testing.T) {
	ix := testIndex(t)
	for modalias, want := range map[string][]string{
		"virtio:d00000001v00001AF4":                             {"virtio_net"},
		"virtio:d00000002v00001AF4":                             nil,
		"pci:v000010ECd00008168sv00001043sd000016D5bc02sc00i00": {"r8169"},
		"acpi:PNP0C0C:":                                         {"button"},
		"acpi:LNXPWRBN:PNP0C0C:":                                {"button"},
		"input:b0019v0000p0001e0000-e0,1,k74,ramlsfw":           {"evdev"},
		"of:NethernetT(null)Cfoo2Cbar":                          {"a"},
		"of:NethernetT(null)Cfoo3Cbar":                          nil,
		"platform:pcspkr":                                       nil, // blacklisted
		"":                                                      nil,
	} {
		if diff := cmp.Diff(want, ix.Match(modalias)); diff != "" {
			t.Errorf("Match(%q) (-want +got):\n%s", modalias, diff)
		}
	}
}

func TestOrder(t *testing.T) {
	ix := testIndex(t)
	for _, tc := range []struct{ name, want string }{
		{"virtio-net", "failover net_failover virtio_net"},
		{"r8169", "libphy realtek r8169"},
		{"ext4", "crc32c_intel crc16 ext4"},
		{"virtio_pci", ""},
		{"pcspkr", "pcspkr"},
		{"a", "a b"}, // a circle of soft dependencies
		{"b", "a b"},
		{"crypto-crc32c", "crc32c_intel"},
	} {
		files, err := ix.Order(tc.name)
		if err != nil {
			t.Errorf("Order(%s): %v", tc.name, err)
			continue
		}
		var names []string
		for _, f := range files {
			names = append(names, moduleName(f))
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("Order(%s) = %s, want %s", tc.name, got, tc.want)
		}
	}
	if _, err := ix.Order("nosuch"); !errors.Is(err, ErrNoModule) {
		t.Errorf("Order(nosuch): %v", err)
	}
}

func TestReadIndexNeedsModulesDep(t *testing.T) {
	if _, err := ReadIndex(fstest.MapFS{}); err == nil || !strings.Contains(err.Error(), "modules.dep") {
		t.Errorf("error = %v", err)
	}
}

// TestWalk plugs a fake sysfs in which a loaded driver brings a new device.
func TestWalk(t *testing.T) {
	sys := t.TempDir()
	device := func(name, modalias string) {
		t.Helper()
		dir := filepath.Join(sys, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "modalias"), []byte(modalias+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	device("virtio0", "virtio:d00000001v00001AF4")
	device("virtio1", "virtio:d00000001v00001AF4")
	device("0000:00:03.0", "pci:v000010ECd00008168sv0sd0bc02sc00i00")

	var inserted []string
	l := NewLoader(testIndex(t), "/m")
	l.insert = func(file string) error {
		name := moduleName(file)
		inserted = append(inserted, name)
		switch name {
		case "virtio_net":
			device("virtio0/input0", "input:b0019v0000p0001e0000-e0,1,k74,ramlsfw")
		case "r8169":
			return unix.ENODEV
		case "realtek":
			return errors.New("bad luck")
		}
		return nil
	}
	loaded, err := l.Walk(context.Background(), sys)
	if err == nil || !strings.Contains(err.Error(), "bad luck") {
		t.Errorf("Walk error = %v, want the soft dependency's", err)
	}
	if got, want := strings.Join(loaded, " "), "virtio_net evdev"; got != want {
		t.Errorf("loaded %q, want %q", got, want)
	}
	if got, want := strings.Join(inserted, " "), "libphy realtek r8169 failover net_failover virtio_net evdev"; got != want {
		t.Errorf("inserted %q, want %q", got, want)
	}
	if err := l.Load("virtio_net"); err != nil || len(inserted) != 7 {
		t.Errorf("second Load: %v, inserted %v", err, inserted)
	}
}

func TestLoadStopsAtFailedDependency(t *testing.T) {
	l := NewLoader(testIndex(t), "/m")
	var inserted []string
	l.insert = func(file string) error {
		inserted = append(inserted, moduleName(file))
		if moduleName(file) == "net_failover" {
			return unix.ENOEXEC
		}
		return nil
	}
	if err := l.Load("virtio_net"); !errors.Is(err, unix.ENOEXEC) {
		t.Errorf("Load = %v, want the dependency's error", err)
	}
	if got, want := strings.Join(inserted, " "), "failover net_failover"; got != want {
		t.Errorf("inserted %q, want %q", got, want)
	}
}

func TestParseEvent(t *testing.T) {
	e, ok := ParseEvent([]byte("add@/devices/virtual/input/input3\x00ACTION=add\x00SUBSYSTEM=input\x00MODALIAS=input:b0\x00junk\x00"))
	want := Event{Action: "add", Path: "/devices/virtual/input/input3", Env: map[string]string{"ACTION": "add", "SUBSYSTEM": "input", "MODALIAS": "input:b0"}}
	if diff := cmp.Diff(want, e); !ok || diff != "" {
		t.Errorf("ParseEvent (-want +got):\n%s", diff)
	}
	if _, ok := ParseEvent([]byte("libudev\x00\xfe\xed")); ok {
		t.Error("took udev's own message for the kernel's")
	}
}

func TestListenerEnds(t *testing.T) {
	l, err := Listen()
	if err != nil {
		t.Skipf("no device events here: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := l.Run(ctx, func(Event) {}); err != nil {
		t.Errorf("Run after cancel: %v", err)
	}
}

func FuzzGlob(f *testing.F) {
	f.Add("pci:v*d[0-9a]?\\*", "pci:v1d0x*")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if strings.Count(pattern, "*") > 6 || len(s) > 100 {
			t.Skip() // backtracking is exponential in stars; depmod's patterns have few
		}
		glob(pattern, s)
		if !strings.ContainsAny(pattern, `*?[\`) && glob(pattern, s) != (pattern == s) {
			t.Errorf("literal %q against %q", pattern, s)
		}
	})
}

func FuzzParseEvent(f *testing.F) {
	f.Add([]byte("add@/x\x00A=b\x00"))
	f.Fuzz(func(t *testing.T, b []byte) { ParseEvent(b) })
}
