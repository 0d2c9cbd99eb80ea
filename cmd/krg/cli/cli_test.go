package cli

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"krgimage/configs/version"
	"krgimage/node/settings"
)

func TestNames(t *testing.T) {
	if _, err := os.Stat(settings.RunDir); err == nil {
		t.Skip("this machine is a node")
	}
	for _, tc := range []struct {
		line        string
		status      int
		out, errOut string // substrings
	}{
		{"krg", 0, "poweroff    Power this node off in order", ""},
		{"/usr/sbin/krg version", 0, "krg " + version.Version, ""},
		{"krg node", 1, "", "krg: this machine isn't a running node"},
		{"krg poweroff", 1, "", "krg: this machine isn't a running node"},
		{"krg reboot", 1, "", "krg: this machine isn't a running node"},
		{"krg log sshd", 1, "", "krg: this machine isn't a running node"},
		{"krg fly", 1, "", `krg: unknown command "fly" for "krg"`},
		{"krg poweroff now", 1, "", "krg: unknown command"},
		{"/init", 1, "", "only the kernel starts this"},
		{"init", 1, "", "only the kernel starts this"},
		{"/usr/bin/migrate 1 2", 1, "", "migrate: this release"},
		{"krginit -s 1", 1, "", "krginit: this release"},
		{"krgadm --version", 0, "krgadm " + version.Version, ""},
	} {
		var out, errOut strings.Builder
		if got := Main(strings.Fields(tc.line), &out, &errOut); got != tc.status {
			t.Errorf("%s: status %d, want %d", tc.line, got, tc.status)
		}
		if !strings.Contains(out.String(), tc.out) || !strings.Contains(errOut.String(), tc.errOut) {
			t.Errorf("%s:\nstdout %q\nstderr %q", tc.line, out.String(), errOut.String())
		}
		if tc.errOut != "" && strings.Count(errOut.String(), "\n") != 1 {
			t.Errorf("%s: error isn't one line: %q", tc.line, errOut.String())
		}
	}
}

func TestNodeText(t *testing.T) {
	s := nodeStatus{
		Node: settings.Node{
			SessionID: 1, NodeID: 3, Hostname: "krg-3", Addresses: []string{"10.77.0.3/24"}, Interface: "eth0", MAC: "52:54:00:00:00:03",
			Root: "10.77.0.254:/", Image: settings.Image{Name: "krg", Version: "1"}, Kernel: "6.12",
		},
		Services: []serviceStatus{{Name: "container", State: "running", PID: 150, Starts: 2, LastExit: "exit status 1"}},
	}
	const want = `session_id: 1
node_id: 3
hostname: krg-3
addresses: 10.77.0.3/24
interface: eth0 52:54:00:00:00:03
root: 10.77.0.254:/
image: krg 1
kernel: 6.12
container: running, pid 150, started 2 times, last exit status 1
`
	if got := s.text(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestDependencies keeps krg small: it lies in the initramfs and, unpacked, in
// every node's memory. Each of these once looked handy.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "krgimage/cmd/krg").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	for pkg := range strings.Lines(string(out)) {
		pkg = strings.TrimSpace(pkg)
		for _, bad := range []string{
			"gvisor.dev/", "go.etcd.io/", "google.golang.org/grpc", "github.com/prometheus/", "github.com/diskfs/",
			"github.com/u-root/u-root/", "github.com/ulikunitz/xz", "github.com/klauspost/compress", "github.com/goccy/go-yaml",
			"github.com/spf13/cobra/doc", "mvdan.cc/sh", "net/http/pprof", "expvar", "html/template",
			"krgimage/configs", "krgimage/images", "krgimage/initramfs", "krgimage/nfsroot/debian", "krgimage/nfsroot/live", "krgimage/nfsroot/nfs", "krgimage/nfsroot/nlm", "krgimage/pxe", "krgimage/cmd/krgimage", "krgimage/node/trial",
		} {
			if strings.HasPrefix(pkg, bad) && pkg != "krgimage/configs/version" {
				t.Errorf("krg depends on %s", pkg)
			}
		}
	}
}
