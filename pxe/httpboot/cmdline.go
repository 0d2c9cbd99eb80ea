package httpboot

import (
	"fmt"
	"net/netip"
	"strings"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// nfsPort is the port that a kernel command line need not name.
const nfsPort = 2049

// Root says where the nodes' root is.
type Root struct {
	Server  netip.Addr // of NFS
	Port    int        // TCP port of NFS
	Path    string     // what nodes mount
	Options []string   // NFS mount options besides those that nodes set themselves
}

// HeadRoot is the root that the head itself serves, as what its server exports
// at path.
func HeadRoot(c *configs.Cluster, path string) Root {
	return Root{Server: c.Network.Head, Port: c.Network.NFSPort, Path: path}
}

// String is the value of nfsroot= and of DHCP's root path, as in the kernel's
// Documentation/admin-guide/nfs/nfsroot.rst: SERVER:PATH[,OPTION]...
func (r Root) String() string {
	s := r.Server.String() + ":" + r.Path
	if r.Port != nfsPort {
		s += fmt.Sprintf(",port=%d", r.Port)
	}
	for _, o := range r.Options {
		s += "," + o
	}
	return s
}

// CommandLine is a node's kernel command line, in the form that Kerrighed's
// nodes are booted with:
//
//	ro root=/dev/ram ip=dhcp nfsroot=SERVER:/PATH session_id=N node_id=M
//
// with autonodeid=0 where the address does not end in the node id: automatic ids
// are on by default and would override node_id. BOOTIF names the interface that
// booted, as pxelinux does; then come kernel.args.
func CommandLine(c *configs.Cluster, n nodes.Node, root Root) string {
	args := []string{
		"ro", "root=/dev/ram", "ip=dhcp", "nfsroot=" + root.String(),
		fmt.Sprintf("session_id=%d", c.SessionID),
		fmt.Sprintf("node_id=%d", n.ID),
	}
	if b := n.Address.As4(); int(b[3]) != n.ID {
		args = append(args, "autonodeid=0")
	}
	args = append(args, "BOOTIF=01-"+strings.ReplaceAll(string(n.MAC), ":", "-"))
	return strings.Join(append(args, printable(c.Kernel.Args)...), " ")
}

// Script is a node's iPXE script. A head that is restarted in the middle costs
// the node a few seconds, not its boot. UEFI kernels find the initramfs by the
// name in initrd=; a BIOS kernel would only wonder about it.
func Script(c *configs.Cluster, n nodes.Node, root Root) string {
	url := fmt.Sprintf("http://%s:%d", c.Network.Head, c.Network.HTTPPort)
	return fmt.Sprintf(`#!ipxe
# node %[1]d of cluster %[2]s
set args %[3]s
iseq ${platform} efi && set args ${args} initrd=initramfs.img ||
:retry
kernel %[4]s/vmlinuz ${args} || goto failed
initrd --name initramfs.img %[4]s/initramfs.img || goto failed
boot || goto failed
:failed
echo The kernel could not be loaded from %[4]s; trying again
imgfree
sleep 5
goto retry
`, n.ID, c.Name, CommandLine(c, n, root), url)
}

// PXELinuxConfig is a node's pxelinux configuration.
func PXELinuxConfig(c *configs.Cluster, n nodes.Node, root Root) string {
	return fmt.Sprintf(`# node %d of cluster %s
DEFAULT krg
PROMPT 0
TIMEOUT 0
LABEL krg
  KERNEL vmlinuz
  INITRD initramfs.img
  APPEND %s
`, n.ID, c.Name, CommandLine(c, n, root))
}
