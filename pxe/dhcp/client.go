package dhcp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"krgimage/configs"
	"krgimage/pxe/nodes"
)

// Client is what one packet says about the machine that sent it.
type Client struct {
	MAC         configs.MAC
	Arch        iana.Arch // option 93; Intel x86 BIOS if it says nothing
	VendorClass string    // option 60
	UserClass   string    // option 77

	IPXE     bool // it is an iPXE
	IPXEHTTP bool // ... that can load by HTTP
	HTTPBoot bool // a UEFI firmware that boots by HTTP (vendor class HTTPClient)

	// NotNetboot says why this is not a machine booting from the network; ""
	// if it is one.
	NotNetboot string
}

// VendorClass prefixes.
const (
	classPXE  = "PXEClient"
	classHTTP = "HTTPClient"
	classNode = "krg" // our own stage 1, when no firmware was seen before it
)

// iPXE's encapsulated options: ipxe.org/howto/dhcpd, src/include/ipxe/dhcp.h.
const (
	optionIPXE      = dhcpv4.GenericOptionCode(175)
	ipxeFeatureHTTP = 19  // 0x13
	ipxeNoProxyDHCP = 176 // 0xb0
)

// Classify reads a request. The error says why it is none that this server may
// answer.
func Classify(p *dhcpv4.DHCPv4) (Client, error) {
	switch hw := p.ClientHWAddr; {
	case p.OpCode != dhcpv4.OpcodeBootRequest:
		return Client{}, errors.New("not a request")
	case p.HWType != iana.HWTypeEthernet || len(hw) != 6:
		return Client{}, fmt.Errorf("hardware type %d with an address of %d bytes is not Ethernet", p.HWType, len(hw))
	case hw[0]&1 != 0 || bytes.Equal(hw, make(net.HardwareAddr, 6)):
		return Client{}, errors.New("not the address of one machine")
	case p.GatewayIPAddr != nil && !p.GatewayIPAddr.IsUnspecified():
		return Client{}, fmt.Errorf("came through the relay %s: only the directly attached subnet is served", p.GatewayIPAddr)
	}
	c := Client{
		MAC:         configs.MAC(p.ClientHWAddr.String()),
		VendorClass: nodes.Clean(p.ClassIdentifier()),
	}
	user := p.Options.Get(dhcpv4.OptionUserClassInformation)
	c.UserClass = nodes.Clean(string(user))
	// iPXE sends the bare string; RFC 3004 §4 wants a length before it.
	c.IPXE = string(user) == "iPXE" || string(user) == "\x04iPXE"
	c.IPXEHTTP = c.IPXE && ipxeFeature(p.Options.Get(optionIPXE), ipxeFeatureHTTP)
	c.HTTPBoot = !c.IPXE && strings.HasPrefix(c.VendorClass, classHTTP)
	c.Arch = arch(p, c.VendorClass)
	switch {
	case c.IPXE, c.HTTPBoot, strings.HasPrefix(c.VendorClass, classPXE):
	case c.VendorClass == "":
		c.NotNetboot = "no vendor class"
	default:
		c.NotNetboot = fmt.Sprintf("vendor class %q is neither PXEClient nor HTTPClient", c.VendorClass)
	}
	return c, nil
}

// arch is the architecture of option 93 (RFC 4578 §2.1), or that in the vendor
// class "PXEClient:Arch:00007:UNDI:003016" for firmwares that send no option.
func arch(p *dhcpv4.DHCPv4, class string) iana.Arch {
	if v := p.Options.Get(dhcpv4.OptionClientSystemArchitectureType); len(v) >= 2 {
		return iana.Arch(binary.BigEndian.Uint16(v))
	}
	if _, rest, ok := strings.Cut(class, ":Arch:"); ok && len(rest) >= 5 {
		if n, err := strconv.ParseUint(rest[:5], 10, 16); err == nil {
			return iana.Arch(n)
		}
	}
	return iana.INTEL_X86PC
}

// ipxeFeature looks for a sub-option of iPXE's option 175 that is present and
// not zero.
func ipxeFeature(v []byte, code byte) bool {
	for len(v) >= 2 && int(v[1])+2 <= len(v) {
		value := v[2 : 2+int(v[1])]
		if v[0] == code {
			return len(bytes.Trim(value, "\x00")) > 0
		}
		v = v[2+len(value):]
	}
	return false
}

// MayBecomeNode says whether discovery may give the machine an id: it boots from
// the network, or it is our own stage 1. A laptop that is plugged into the
// cluster's switch must not take a node id.
func (c Client) MayBecomeNode() bool {
	return c.NotNetboot == "" || strings.HasPrefix(c.VendorClass, classNode)
}

// String names the firmware for people.
func (c Client) String() string {
	kind := "PXE"
	switch {
	case c.IPXE:
		kind = "iPXE"
	case c.HTTPBoot:
		kind = "UEFI HTTP"
	case c.NotNetboot != "":
		return "not a netboot client"
	}
	name := c.Arch.String()
	if name == "unknown" {
		name = fmt.Sprintf("architecture %d", c.Arch)
	}
	return kind + ", " + name
}
