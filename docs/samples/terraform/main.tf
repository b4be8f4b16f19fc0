# Deploys replicate-serverless with Terraform or OpenTofu, as one CloudFormation stack: the released template stays as it
# is, and CloudFormation expands its SAM transform.
#
# packaged.yaml is the template whose code is in S3 (`sam package`, see README.md). It is larger than the 51,200 bytes of
# template_body, so that it goes through a bucket of yours in the same region.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

variable "templates_bucket" {
  type        = string
  description = "Bucket for the template, in the region of the stack."
}

variable "token_secret_arn" {
  type        = string
  description = "ARN of the secret with the Replicate token. The token itself never gets into Terraform's state."
}

variable "packaged_template" {
  type        = string
  default     = "packaged.yaml"
  description = "Path of the packaged template."
}

variable "stack_name" {
  type        = string
  default     = "replicate-serverless"
  description = "Name of the stack; at most 30 characters where recipes have triggers."
}

variable "alarm_topic_arn" {
  type        = string
  default     = ""
  description = "ARN of the SNS topic for alarms, or empty."
}

variable "permissions_boundary_arn" {
  type        = string
  default     = ""
  description = "ARN of the permissions boundary of all roles, or empty."
}

data "aws_s3_bucket" "templates" {
  bucket = var.templates_bucket
}

resource "aws_s3_object" "template" {
  bucket = var.templates_bucket
  # Another template is another key, and so another template_url: Terraform does not look into the file behind a URL.
  key    = "replicate-serverless/${filesha256(var.packaged_template)}.yaml"
  source = var.packaged_template

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_cloudformation_stack" "replicate" {
  name         = var.stack_name
  template_url = "https://${data.aws_s3_bucket.templates.bucket_regional_domain_name}/${aws_s3_object.template.key}"
  # Terraform creates the stack without a change set, and then CloudFormation wants consent to the transform, too.
  capabilities = ["CAPABILITY_IAM", "CAPABILITY_AUTO_EXPAND"]

  # ReplicateApiToken is not among them: CloudFormation shows a hidden parameter as ****, a change in every plan.
  parameters = {
    ReplicateTokenSecretArn = var.token_secret_arn
    AlarmTopicArn           = var.alarm_topic_arn
    PermissionsBoundaryArn  = var.permissions_boundary_arn
    RetentionDays           = "30"
  }

  tags = {
    service = "replicate-serverless"
  }

  timeouts {
    create = "60m"
    update = "60m"
    delete = "60m"
  }
}

output "api_url" {
  value = aws_cloudformation_stack.replicate.outputs["ApiUrl"]
}

output "requests_queue_url" {
  value = aws_cloudformation_stack.replicate.outputs["RequestsQueueUrl"]
}

output "requests_queue_arn" {
  value = aws_cloudformation_stack.replicate.outputs["RequestsQueueArn"]
}

output "event_bus_name" {
  value = aws_cloudformation_stack.replicate.outputs["EventBusName"]
}

output "outputs_bucket" {
  value = aws_cloudformation_stack.replicate.outputs["OutputsBucketName"]
}
